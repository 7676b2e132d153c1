"""What happens before a model runs: importing, attaching, saving and loading."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import loraweave as lw
from loraweave.mixing.types import Policy
from speed.models import Bench, Models
from speed.ours import attach
from speed.peers import peft_all
from speed.timing import Task


def attaching(bench: Bench, _: Models) -> dict[str, Task]:
    """From the experts' folders to a model that is ready to run; the bare model is there already."""

    def peft(_: None) -> None:
        peft_all(bench)

    def loraweave(policy: Policy, _: None) -> None:
        attach(bench, policy)

    return {
        "peft all": Task(peft, rounds=1 if bench.size.experts > 32 else None),
        "sum": Task(partial(loraweave, lw.Sum())),
        "mole block": Task(partial(loraweave, lw.MoLE(granularity="block"))),
    }


def saving(bench: Bench, _: Models) -> dict[str, Task]:
    """A mixture to a folder that names its experts, and back."""
    folder = Path(bench.contexts.enter_context(tempfile.TemporaryDirectory()))
    mixture = attach(bench, lw.MoLE(granularity="block"))
    count = iter(range(1_000_000))
    mixture.save_pretrained(folder / "kept")

    def save(_: None) -> None:
        mixture.save_pretrained(folder / str(next(count)))

    def load(_: None) -> None:
        lw.load(folder / "kept", bench.model())

    return {"save": Task(save), "load": Task(load)}


def importing(_: Bench, __: Models) -> dict[str, Task]:
    """A fresh interpreter each time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(arguments: tuple[str, ...], _: None) -> None:
        subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            check=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
        )

    commands = {
        "torch": ("-c", "import torch"),
        "loraweave": ("-c", "import loraweave"),
        "loraweave.attach": ("-c", "import loraweave; loraweave.attach"),
        "loraweave --help": ("-m", "loraweave", "--help"),
        "peft": ("-c", "import peft"),
    }
    return {name: Task(partial(run, arguments)) for name, arguments in commands.items()}
