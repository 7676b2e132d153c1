"""Invariant 8: the attached mixture equals explicit loops over the experts, with the weights it says it used."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
from methods import METHODS

PLAIN = [name for name, policy in METHODS.items() if policy.mix == "deltas"]


@cache
def slow(architecture: str) -> tuple[Any, dict[str, Any]]:
    """A mixture by loops, and where to put the function that gives its weights."""
    told: dict[str, Any] = {}
    bare = tiny.model(architecture, torch.float64)
    experts = tiny.experts(bare, architecture)
    return tiny.slow_mixture(bare, experts, lambda path: told["weights"](path)), told


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("architecture", tiny.EVERY)
def test_mixture_equals_loops(mixed: Any, architecture: str, method: str) -> None:
    inputs = tiny.batch(architecture)
    decisions = tiny.Decisions(mixed(architecture, METHODS[method]), inputs)
    by_loops, told = slow(architecture)
    told["weights"] = decisions
    assert_close(decisions.logits, tiny.logits(by_loops, inputs), atol=1e-10, rtol=1e-10)
    bare = tiny.logits(tiny.model(architecture, torch.float64), inputs)
    assert (bare - decisions.logits).abs().max() > 1e-2
