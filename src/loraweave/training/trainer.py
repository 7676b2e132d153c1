"""``GateTrainer``: a ``transformers.Trainer`` that trains gates and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from loraweave import persistence
from loraweave.errors import LoraweaveError
from loraweave.mixture import Mixture
from loraweave.training import objective, sharded
from loraweave.training.standards import MEASURED_BATCHES, measure


class GateTrainer(Trainer):
    """Trains the gates of a mixture with ``task loss + balance * balance loss`` (MoLE Eq. 16).

    Everything else is :class:`transformers.Trainer`: accelerate, several GPUs, mixed precision, gradient accumulation,
    callbacks, checkpoints and resuming. A checkpoint holds the saved mixture (gates, not the model) beside the
    optimizer's state. The log carries ``task_loss``, ``balance_loss``, the mean ``entropy``, ``entropy/SITE`` and
    ``load/EXPERT``.

    Args:
        mixture: an attached mixture with a policy that learns.
        args: training arguments; ``label_names`` and the like as usual.
        balance: weight of the balance loss; default: what the policy says.
        **options: anything else :class:`transformers.Trainer` takes, but ``model``.

    Raises:
        LoraweaveError: the policy has no gates to train, or the mixture is folded.
    """

    is_fsdp_enabled: bool
    model: Any
    optimizer: Any

    def __init__(
        self, mixture: Mixture, args: TrainingArguments, *, balance: float | None = None, **options: Any
    ) -> None:
        if not any(True for _ in mixture.gate_parameters()):
            raise LoraweaveError(
                f"nothing to train: a {mixture.policy.name!r} policy has no gates that learn; use MoLE"
            )
        if mixture.folded:
            raise LoraweaveError("cannot train gates that are folded into the weights; call unfold() first")
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise LoraweaveError("gate training needs gradient_checkpointing_kwargs={'use_reentrant': False}")
        self.mixture = mixture
        self.balance = float(getattr(mixture.policy, "balance", 0.0) if balance is None else balance)
        self._seen: dict[str, Tensor] = {}
        with _as_adapted(mixture.model):
            super().__init__(model=mixture.model, args=args, **options)
        if _ignores_items(mixture.model):
            self.model_accepts_loss_kwargs = False
        self._to_measure = False
        if self.is_fsdp_enabled:
            sharded.keep_whole(self.accelerator, mixture.gates.values())
            self.add_callback(sharded.OnceSharded(self._measure))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sites = [site for site in self.mixture.sites if site.gate is not None]
        for site in sites:
            site.clear()
        with self._prompt(inputs):
            task, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        # Blocks that layer dropout skipped have decided nothing.
        balance = objective.balance([site for site in sites if site.current is not None])
        if model.training:
            self._seen = {"task_loss": task.detach(), "balance_loss": balance.detach()}
        # The task loss is a share of the whole accumulated batch where the model normalises by its items.
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        whole = whole or self.compute_loss_func is not None
        steps = self.current_gradient_accumulation_steps if whole and model.training else 1
        loss = task + self.balance * balance.to(task.device) / steps
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As in :class:`transformers.Trainer`; gates that read standard scores first measure what they read."""
        self._to_measure = not resume_from_checkpoint
        if not self.is_fsdp_enabled:  # else once the base is sharded, which as a whole may fit no device
            self._measure()
        return super().train(resume_from_checkpoint, *args, **options)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """As in :class:`transformers.Trainer`; FSDP leaves the gates to us, so we average their gradients."""
        loss: Tensor = super().training_step(*args, **options)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            sharded.average_gradients(self.accelerator, (p for _, p in self.mixture.gate_parameters()))
        return loss

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As in :class:`transformers.Trainer`; FSDP2 shards a model beside its optimizer only, so it gets one."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        return super().evaluation_loop(*args, **options)

    def _measure(self) -> None:
        if self._to_measure:
            self._to_measure = False
            measure(self.mixture, self._measured, self.accelerator)

    def _measured(self) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            # The order of the data in training proper shall not hang on this.
            with torch.random.fork_rng(devices=[]):
                for batch in islice(self.get_train_dataloader(), MEASURED_BATCHES):
                    inputs = self._prepare_inputs(batch)
                    with self.compute_loss_context_manager(), self._prompt(inputs):
                        self.model(**inputs)
        finally:
            self.model.train(was_training)

    def _prompt(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Where the trainer takes the labels away (label smoothing), gates must be told what the prompt is."""
        labels = inputs.get("labels")
        taken = self.label_smoother is not None or self.compute_loss_func is not None
        if labels is None or not taken or getattr(self.mixture.model.config, "is_encoder_decoder", False):
            return nullcontext()
        before = (labels != -100).long().cumsum(1) == 0
        mask = inputs.get("attention_mask")
        return self.mixture.prompt(before if mask is None else before & mask.bool())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._seen:
            logs |= {name: round(float(value), 6) for name, value in self._seen.items()}
            logs |= gate_statistics(self.mixture)
        super().log(logs, start_time)

    @contextmanager
    def _as_whole(self) -> Iterator[None]:
        """Gates and their optimizer's state are whole on every process: checkpoints are those of one process."""
        before, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = before

    def save_model(self, *args: Any, **options: Any) -> None:
        """Write the mixture: gates, not the model."""
        with self._as_whole():
            super().save_model(*args, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_whole():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_whole():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        if self.args.should_save:
            persistence.save(self.mixture, output_dir or str(self.args.output_dir), into=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:  # noqa: ARG002
        persistence.load_gates(self.mixture, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        persistence.load_gates(self.mixture, str(self.state.best_model_checkpoint))


@contextmanager
def _as_adapted(model: Any) -> Iterator[None]:
    """The trainer refuses quantised models without adapters, and knows peft's alone; gates over LoRAs are adapters."""
    if not getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def _ignores_items(model: nn.Module) -> bool:
    """Whether a model takes ``num_items_in_batch`` and does nothing with it, as T5 and BART do.

    The trainer believes of every model with ``**kwargs`` that it normalises its loss by the items of the whole
    accumulated batch, and would add up the means of T5's small batches instead of averaging them.
    """
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        return False
    return "loss_function(" not in source and "num_items_in_batch" not in source


@torch.no_grad()
def gate_statistics(mixture: Mixture) -> dict[str, float]:
    """Entropy per site (nats) and load per expert (mean share) in the last pass."""
    sites = [site for site in mixture.sites if site.gate is not None and site.current is not None]
    # Each reading waits for a GPU, so there is one for all sites.
    found = [objective.entropy(site) for site in sites]
    values = torch.stack([entropy.to(found[-1].device) for entropy in found]).tolist()
    entropies = dict(zip([site.name for site in sites], values, strict=True))
    load = objective.mean_shares(sites).tolist()
    return {
        "entropy": round(sum(entropies.values()) / len(entropies), 5),
        **{f"entropy/{name}": round(value, 5) for name, value in entropies.items()},
        **{f"load/{name}": round(value, 5) for name, value in zip(mixture.experts, load, strict=True)},
    }


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, ``None`` if there is none.

    The trainer writes ``trainer_state.json`` last, so a checkpoint without it was cut off.
    """
    numbered = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and (path / "trainer_state.json").is_file() and (path / persistence.GATES).is_file():
            numbered.append((int(step), path))
    return max(numbered)[1] if numbered else None
