"""Pictures on a device other than the CPU, as on a GPU: the same ones, and no step waits for a value."""

from __future__ import annotations

import pipes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
    with elsewhere() as seen:
        yield seen.waits


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
        mixture = tiny.alike(known, lw.attach(there, files, policy))
        assert_close(pipes.latents(there).cpu(), pipes.latents(here), msg=lambda text, name=name: f"{name}: {text}")
        few, many = (counted(steps) - of_bare for steps, of_bare in zip(STEPS, bare, strict=True))
        reads = READS_OF_FLUX if kind == "flux" else READS
        assert many - few == reads.get(name, 0), name
        known.detach()
        mixture.detach()


@pytest.mark.slow
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("mode", ["model", "sequential"])
@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_models_that_wait_on_the_cpu_are_the_same(
    kind: str, mode: str, attached: str, waits: Counter[str], tmp_path: Path
) -> None:
    here = pipes.make(kind)
    files = pipes.files(here, tmp_path, text=False)
    for name in ("sum", "chunk", "mole"):
        known = tiny.randomize(lw.attach(here, files, POLICIES[name]))
        there = pipes.make(kind)
        if attached == "before":
            tiny.alike(known, lw.attach(there, files, POLICIES[name]))
        getattr(there, f"enable_{mode}_cpu_offload")(device=DEVICE)
        if attached == "after":
            tiny.alike(known, lw.attach(there, files, POLICIES[name]))
        expected = pipes.latents(here)
        for _ in range(2):
            assert_close(pipes.latents(there).cpu(), expected, msg=lambda text, name=name: f"{name}: {text}")
        known.detach()
