"""Pictures on a device other than the CPU, as on a GPU: the same ones, and no step waits for a value."""

from __future__ import annotations

import pipes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from elsewhere import DEVICE, elsewhere

HALVES = {"hero": (0.0, 0.0, 0.5, 1.0), "coat": (0.5, 0.0, 1.0, 1.0)}
POLICIES: dict[str, Any] = {
    "sum": lw.Sum(),
    "schedule": lw.Sum(weights={"hero": "0@0,1@0.5"}),
    "switch": lw.Switch(every=1),
    "composite": lw.Composite(),
    "chunk": lw.Composite(chunk=1),
    "regional": lw.Regional(HALVES),
    "mole": lw.MoLE(),
    "mole-topk": lw.MoLE(activation="topk", k=2, granularity="layer"),
}
# What is read from the device at every step: its time, by those that follow them, and where Flux's cells stand.
READS = {"schedule": 1, "switch": 1}
READS_OF_FLUX = READS | {"regional": 1}
STEPS = (2, 3)


@pytest.fixture
def waits() -> Iterator[Counter[str]]:
    with elsewhere() as counted:
        yield counted


@pytest.mark.slow
@pytest.mark.parametrize("kind", pipes.KINDS)
def test_pictures_are_the_same_elsewhere(kind: str, waits: Counter[str], tmp_path: Path) -> None:
    here, there = pipes.make(kind), pipes.make(kind).to(DEVICE)
    files = pipes.files(here, tmp_path, text=False)

    def counted(steps: int) -> int:
        waits.clear()
        pipes.latents(there, num_inference_steps=steps)
        return sum(waits.values())

    counted(2)
    bare = [counted(steps) for steps in STEPS]
    for name, policy in POLICIES.items():
        known = tiny.randomize(lw.attach(here, files, policy))
        mixture = lw.attach(there, files, policy)
        with torch.no_grad():
            for (_, parameter), (_, gate) in zip(known.gate_parameters(), mixture.gate_parameters(), strict=True):
                gate.copy_(parameter)
        assert_close(pipes.latents(there).cpu(), pipes.latents(here), msg=lambda text, name=name: f"{name}: {text}")
        few, many = (counted(steps) - of_bare for steps, of_bare in zip(STEPS, bare, strict=True))
        reads = READS_OF_FLUX if kind == "flux" else READS
        assert many - few == reads.get(name, 0), name
        known.detach()
        mixture.detach()
