"""Training by gradients of what is no mixture: a new LoRA, or another library's classifier."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraweave.experts.types import Expert
from loraweave.text import Collator
from loraweave.training.train import BATCH_SIZE

if TYPE_CHECKING:
    from loraweave.evaluation.yardsticks import Setting


def train_lora(setting: Setting, targets: Sequence[str], rank: int, learning_rate: float) -> Expert:
    """Train a LoRA with peft on the setting's examples; the model is bare again afterwards.

    Args:
        setting: model, examples, and ``steps``, ``batch_size`` ... in its options.
        targets: module paths.
        rank: of all of them; alpha is twice the rank.
        learning_rate: at its highest.
    """
    import peft

    from loraweave.experts.reader import read_expert

    model: nn.Module = setting.model
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    torch.manual_seed(setting.seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    tuned = peft.get_peft_model(setting.model, config)
    try:
        fit(tuned, setting, learning_rate)
        with tempfile.TemporaryDirectory() as scratch:
            tuned.save_pretrained(scratch, save_embedding_layers=False)
            fresh = read_expert(scratch, "fresh")
    finally:
        tuned.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    return Expert("fresh", fresh.factors, base=fresh.base)


def fit(model: Any, setting: Setting, learning_rate: float) -> None:
    """Train whatever of ``model`` requires gradients on the setting's examples, as gates are trained.

    Args:
        model: with a loss, as transformers has it.
        setting: examples, seed, and ``steps``, ``batch_size`` ... in its options.
        learning_rate: at its highest; it falls linearly to zero.
    """
    from transformers import Trainer, TrainingArguments

    steps = setting.taught().evaluations
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=int(setting.options.get("batch_size", BATCH_SIZE)),
            gradient_accumulation_steps=int(setting.options.get("gradient_accumulation_steps", 1)),
            warmup_steps=max(1, steps // 20),
            lr_scheduler_type="linear",
            seed=setting.seed,
            bf16=bool(setting.options.get("bf16", False)),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=next(model.parameters()).is_cuda,
        )
        rows: Any = setting.encoded()
        Trainer(model, arguments, train_dataset=rows, data_collator=Collator(setting.tokenizer)).train()
