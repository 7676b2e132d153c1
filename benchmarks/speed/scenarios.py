"""What is timed. A scenario builds its contenders' tasks; adding one means adding a function to ``SCENARIOS``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraweave as lw
from loraweave.mixing.types import Policy
from speed.models import Bench, token_ids
from speed.ours import attach
from speed.peers import peft_all
from speed.timing import Task
from speed.training import STEPS

Models = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Scenario:
    """A set of tasks to be timed against one another.

    Attributes:
        group: what ``--only`` calls it.
        what: one line for the table; a format string of the size.
        baseline: the task that the others' ratios refer to.
        tasks: builds them, by name; the models are those of ``peers.PEERS`` and ``ours.OURS``.
        calls: runs per round.
    """

    group: str
    what: str
    baseline: str
    tasks: Callable[[Bench, Models], dict[str, Task]]
    calls: int = 1


def forward(bench: Bench, models: Models) -> dict[str, Task]:
    batch = token_ids(bench.size, bench.size.batch, bench.size.length)

    def run(model: nn.Module, _: None) -> None:
        with torch.inference_mode():
            model(**batch, use_cache=False)

    return {name: Task(partial(run, model)) for name, model in models.items()}


def generate(bench: Bench, models: Models, *, rows: int, slow_rounds: int) -> dict[str, Task]:
    batch = token_ids(bench.size, rows, bench.size.prompt)
    tokens = bench.size.new_tokens

    def run(model: Any, _: None) -> None:
        # Greedy, with a key-value cache; X-LoRA switches the cache off by itself.
        ids = model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        assert ids.shape[1] == bench.size.prompt + tokens

    slow = {name: slow_rounds for name in models if name == "peft X-LoRA"}
    return {name: Task(partial(run, model), rounds=slow.get(name)) for name, model in models.items()}


def train(bench: Bench, _: Models) -> dict[str, Task]:
    def run(step: Callable[[], None], _: None) -> None:
        step()

    return {name: Task(partial(run, build(bench))) for name, build in STEPS.items()}


def attaching(bench: Bench, _: Models) -> dict[str, Task]:
    """From the experts' folders to a model that is ready to run; the bare model is there already."""

    def peft(_: None) -> None:
        peft_all(bench)

    def loraweave(policy: Policy, _: None) -> None:
        attach(bench, policy)

    return {
        "peft all": Task(peft),
        "sum": Task(partial(loraweave, lw.Sum())),
        "mole block": Task(partial(loraweave, lw.MoLE(granularity="block"))),
    }


def importing(_: Bench, __: Models) -> dict[str, Task]:
    """A fresh interpreter each time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(statement: str, _: None) -> None:
        subprocess.run([sys.executable, "-c", statement], env=environment, check=True, cwd=Path(__file__).parent)

    statements = {
        "torch": "import torch",
        "loraweave": "import loraweave",
        "loraweave.attach": "import loraweave; loraweave.attach",
        "peft": "import peft",
    }
    return {name: Task(partial(run, statement)) for name, statement in statements.items()}


SCENARIOS = {
    "forward": Scenario("forward", "batch {0.batch} x {0.length}", "bare", forward),
    "generate, batch 1": Scenario(
        "generate",
        "{0.new_tokens} new tokens after a prompt of {0.prompt}",
        "bare",
        partial(generate, rows=1, slow_rounds=3),
    ),
    "generate, batch 8": Scenario(
        "generate",
        "{0.new_tokens} new tokens after prompts of {0.prompt}",
        "bare",
        partial(generate, rows=8, slow_rounds=1),
    ),
    "train": Scenario("train", "forward, backward and AdamW, batch {0.batch} x {0.length}", "peft LoRA", train),
    "attach": Scenario("start", "{0.experts} experts from files", "peft all", attaching),
    "import": Scenario("start", "a fresh interpreter", "torch", importing),
}
