"""Compiled denoisers under policies that follow the run: as few graphs as the method needs, and the same numbers."""

from __future__ import annotations

import copy
import pipes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
from loraweave.mixing.layer import MixingLayer

STEPS = {"num_inference_steps": 12}
SCHEDULE = {"hero": "0@0,1@0.5", "ink": "1@0,0@0.5"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def small() -> Any:
    """A transformer of one block."""
    pipe = pipes.make("sd3")
    del pipe.transformer.transformer_blocks[0]
    return pipe


def experts(pipe: Any, folder: Path, alike: bool) -> dict[str, Path]:
    """Three LoRAs; of the same modules and ranks, or of others each."""
    modules = {p: m for p, m in pipes.targets(pipe, pipes.ATTENTION).items() if p.startswith("transformer.")}
    made = {}
    for n, name in enumerate(pipes.NAMES):
        chosen = modules if alike else dict(list(modules.items())[n:])
        made[name] = pipes.write(folder / f"{name}.safetensors", pipes.factors(chosen, n, 4 if alike else 2 + n))
    return made


def compiled(pipe: Any, inside: bool) -> list[int]:
    """Compile the denoiser; the list grows by one with each graph."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    if inside:
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    return graphs


@pytest.mark.parametrize(
    ("policy", "alike", "inside", "graphs"),
    [
        (lw.Switch(every=2), True, True, 1),
        pytest.param(lw.Switch(every=1), False, False, 3, marks=pytest.mark.slow),
        pytest.param(lw.Composite(), True, False, 1, marks=pytest.mark.slow),
        pytest.param(lw.Composite(chunk=1), True, True, 1, marks=pytest.mark.slow),
        pytest.param(lw.Composite(chunk=2), True, False, 2, marks=pytest.mark.slow),
        (lw.Sum(weights=SCHEDULE), True, False, 1),
    ],
    ids=["switch", "switch-unlike", "composite", "chunk-1", "chunk-2", "schedule"],
)
def test_graphs_of_a_run_of_twelve_steps(
    policy: Any, alike: bool, inside: bool, graphs: int, small: Any, attach: Any, tmp_path: Path
) -> None:
    pipe = copy.deepcopy(small)
    attach(pipe, experts(pipe, tmp_path, alike), policy)
    expected = pipes.latents(pipe, **STEPS)
    seen = compiled(pipe, inside)
    for _ in range(2):
        assert_close(pipes.latents(pipe, **STEPS), expected, atol=1e-9, rtol=1e-9)
    assert len(seen) == graphs
    assert min(seen) > 100, "more than the denoiser itself was compiled, or less"


def test_a_copy_of_a_model_that_follows_the_run_has_weights_of_its_own(small: Any, attach: Any, tmp_path: Path) -> None:
    """The hooks stay bound methods: a copied pipeline's turns are not the original's."""
    pipe = copy.deepcopy(small)
    files = experts(pipe, tmp_path, False)
    attach(pipe, files, lw.Switch(every=1))
    alone = pipes.latents(pipe, num_inference_steps=1)
    pipes.latents(pipe)  # ends in another turn
    other = copy.deepcopy(pipe)
    layers = [m for m in pipe.transformer.modules() if isinstance(m, MixingLayer)]
    before = [layer.fixed for layer in layers]
    assert torch.equal(pipes.latents(other, num_inference_steps=1), alone)
    assert all(layer.fixed is term for layer, term in zip(layers, before, strict=True))
