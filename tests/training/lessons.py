"""Something that gates can learn: to sound like one of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import loraweave as lw
import tiny
from loraweave.mixture import Mixture

ARCHITECTURES = ("t5", "llama")


def mixture(architecture: str, policy: Any = None, **options: Any) -> Mixture:
    """A mixture whose experts are strong enough to be told apart."""
    return tiny.attached(architecture, policy or lw.MoLE(), **options)


def lesson(architecture: str, count: int = 24, teacher: str = "ant", seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of tokens whose answers are what the model says with one expert alone."""
    taught = tiny.attached(architecture, lw.Sum())
    inputs = tiny.batch(architecture, (6,) * count, seed=seed)
    with taught.only(teacher):
        if architecture == "t5":
            start = torch.zeros(count, 1, dtype=torch.long)
            labels = tiny.logits(taught.model, {**inputs, "decoder_input_ids": start}).argmax(-1)
            for _ in range(2):
                given = torch.cat([start, labels], 1)
                more = tiny.logits(taught.model, {**inputs, "decoder_input_ids": given}).argmax(-1)[:, -1:]
                labels = torch.cat([labels, more], 1)
        else:
            for _ in range(3):
                answer = tiny.logits(taught.model, inputs)[:, -1:].argmax(-1)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            labels = inputs["input_ids"].clone()
            labels[:, :6] = -100
    columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    return [{key: value[row].tolist() for key, value in columns.items()} for row in range(count)]


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**(settings | options))


def gates(mixture: Mixture) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in mixture.gate_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(p, other[name]) for name, p in one.items())
