"""Trains gates, alone or as one of several processes; writes the result. Run by test_ddp.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lessons
import torch
from safetensors.torch import save_file

import loraweave as lw
import tiny
from loraweave.cli.processes import part


def train(architecture: str, batch: int, balance: float, out: Path) -> None:
    mixture = tiny.randomize(lessons.mixture(architecture))
    arguments = lessons.arguments(
        out,
        max_steps=4,
        per_device_train_batch_size=batch,
        save_strategy="steps",
        save_steps=4,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    rows = lessons.lesson(architecture, 16)
    trainer = lw.GateTrainer(mixture, arguments, balance=balance, train_dataset=rows)
    trainer.train()
    save_file(lessons.gates(mixture), out / f"rank{arguments.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
    part()
