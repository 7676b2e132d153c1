"""Mixtures in tiny pipelines equal what diffusers' own adapters give."""

from __future__ import annotations

import pipes
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_one_expert_at_weight_one_equals_load_lora_weights(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    bare = pipes.latents(pipe)
    mixture = attach(pipe, {"ink": files["ink"]}, lw.Sum())
    mixed = pipes.latents(pipe)
    reference.set_adapters(["ink"])
    assert_close(mixed, pipes.latents(reference), **CLOSE)
    assert (mixed - bare).abs().max() > 0.05
    assert mixture.detach() is pipe
    assert torch.equal(pipes.latents(pipe), bare)


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_merge_equals_set_adapters(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    weights = {"hero": 0.5, "coat": -0.3, "ink": 0.25}
    attach(pipe, files, lw.Sum(weights=weights))
    reference.set_adapters(list(weights), list(weights.values()))
    assert_close(pipes.latents(pipe), pipes.latents(reference), **CLOSE)
