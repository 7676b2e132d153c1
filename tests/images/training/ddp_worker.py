"""Teaches gates by both objectives, alone or as one of several processes, and writes them (test_gate_processes.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # before the pipes of Python itself

import image_lessons as lessons
import torch
from safetensors.torch import save_file

import loraweave as lw
from loraweave.cli.processes import part


def train(batch: int, out: Path) -> None:
    rank = os.environ.get("RANK", "0")
    place = out / f"experts{rank}"
    place.mkdir()
    pipe = lessons.pipeline("sd15")
    files = lessons.files(pipe, place)
    pairs = [(lessons.picture(n), prompt) for n, prompt in enumerate(lessons.PROMPTS)]
    # In two processes the rows of a step have one mask, or two, of which each process has one.
    masked = [("hero coat", ["coat", "hero"]), "hero", ("coat", ["hero", "coat"]), ("a coat", ["coat"])]
    for name, data, objective in (("clip", None, None), ("masked", masked, None), ("denoising", pairs, lw.Denoising())):
        mixture = lw.attach(pipe, files, lw.MoLE())
        lessons.train(mixture, data, objective, steps=3, batch_size=batch, learning_rate=0.02, balance=0.5)
        gates = {key.replace("/", ":"): value for key, value in lessons.gates(mixture).items()}
        save_file(gates, out / f"{name}{rank}.safetensors")
        mixture.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1]), Path(sys.argv[2]))
    part()
