"""``train``: gates learned in one call, with defaults that suit a few hundred examples."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import ExampleSource, read_examples
from loraweave.mixture import Mixture
from loraweave.text import Collator, encode_example


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        steps: optimizer steps, those before a resumption included.
        seconds: wall-clock time of this call.
        loss: mean training loss of this call.
        history: the log: loss, ``task_loss``, ``balance_loss``, ``entropy``, ``load/EXPERT`` ... by step.
        earlier_seconds: wall-clock time of the calls that this one goes on from, up to the last checkpoint; known of
            gates over pipelines alone.
    """

    steps: int
    seconds: float
    loss: float
    history: list[dict[str, float]] = field(repr=False)
    earlier_seconds: float = 0.0


# For gates that suggest none.
LEARNING_RATE = 1e-2
BATCH_SIZE = 24
# The settings of the MoLE paper (section 4.2), beside ``MoLE.paper()``.
PAPER = {"learning_rate": 1e-5, "steps": 800, "batch_size": 12, "balance": 0.5}


def train(
    mixture: Mixture,
    data: ExampleSource,
    *,
    steps: int = 100,
    learning_rate: float | None = None,
    batch_size: int = BATCH_SIZE,
    balance: float | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
    progress: bool | str = True,
    **arguments: Any,
) -> TrainingResult:
    """Train the gates of ``mixture`` on examples; the experts and the model stay as they are.

    Args:
        mixture: an attached mixture whose policy learns.
        data: a jsonl file, a list of ``{"input", "target"}`` or a ``datasets`` object.
        steps: optimizer steps.
        learning_rate: at its highest; a short warm-up, then linear to zero. Default: what suits the gates' width.
        batch_size: examples per step and device.
        balance: weight of the balance loss; default: the policy's.
        seed: of the order of the data and of dropout.
        tokenizer: default: the one beside the model's weights.
        output_dir: where checkpoints go; none are kept by default.
        resume: go on from the last whole checkpoint in ``output_dir``, if there is one.
        max_input_length, max_target_length: in tokens; longer texts are cut.
        progress: show a progress bar; a text stands before it.
        **arguments: any other field of ``transformers.TrainingArguments`` (``bf16``, ``save_steps`` ...).

    Raises:
        LoraweaveError: the policy has no gates, or the data cannot be read or is empty.
    """
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from loraweave.training.progress import OneLineProgress
    from loraweave.training.trainer import GateTrainer, last_whole_checkpoint

    if mixture.pipeline is not None:
        raise LoraweaveError("train: this mixture stands in a diffusers pipeline; use lw.train_images")
    examples = read_examples(data)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise LoraweaveError(f"{name}: expected at least 1, got {value}")
    if resume and output_dir is None:
        raise LoraweaveError("resume: nothing to resume from; give the output_dir of the run that was cut off")
    tokenizer = tokenizer or load_tokenizer(mixture.model)
    seq2seq = bool(getattr(mixture.model.config, "is_encoder_decoder", False))
    rows = [
        encode_example(
            tokenizer,
            example,
            is_encoder_decoder=seq2seq,
            max_input_length=max_input_length,
            max_target_length=max_target_length,
        )
        for example in examples
    ]
    was_training = mixture.model.training
    with tempfile.TemporaryDirectory() as scratch:
        defaults: dict[str, Any] = {
            "output_dir": str(output_dir or scratch),
            "max_steps": steps,
            "learning_rate": learning_rate or default_learning_rate(mixture),
            "per_device_train_batch_size": batch_size,
            "warmup_steps": max(1, steps // 20),
            "lr_scheduler_type": "linear",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "logging_steps": max(1, steps // 20),
            "save_strategy": "no" if output_dir is None else "steps",
            "save_steps": max(1, steps // 4),
            "save_total_limit": 2,
            "seed": seed,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "ddp_broadcast_buffers": False,
            "dataloader_pin_memory": next(mixture.model.parameters()).is_cuda,
        }
        trainer = GateTrainer(
            mixture,
            TrainingArguments(**(defaults | arguments)),
            balance=balance,
            train_dataset=rows,
            data_collator=Collator(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(OneLineProgress("training gates" if progress is True else progress))
        checkpoint = last_whole_checkpoint(output_dir) if resume and output_dir is not None else None
        started = time.perf_counter()
        try:
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            mixture.model.train(was_training)
    return TrainingResult(
        steps=int(trainer.state.global_step),
        seconds=time.perf_counter() - started,
        loss=float(outcome.training_loss),
        history=list(trainer.state.log_history),
    )


def default_learning_rate(mixture: Mixture) -> float:
    """The smallest that any of the mixture's gates suggests."""
    return min((getattr(g, "suggested_learning_rate", LEARNING_RATE) for g in mixture.gates.values()), default=1.0)


def load_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that lies beside the model's weights.

    Raises:
        LoraweaveError: the model was not loaded from anywhere, or nothing there is a tokenizer.
    """
    from transformers import AutoTokenizer

    place = getattr(model, "name_or_path", "")
    if not place:
        raise LoraweaveError("tokenizer: this model was not loaded from a folder or the hub; pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise LoraweaveError(f"tokenizer: none found at {place!r}; pass tokenizer=") from error
