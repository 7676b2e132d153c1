"""Gates learn in mixed precision, and stay in single precision themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import image_lessons as lessons
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import loraweave as lw


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """A process has one precision for all it trains; other tests have theirs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32-base", "bf16-base"])
@pytest.mark.parametrize("objective", ["guidance", "denoising"])
def test_bf16_training_moves_gates_that_stay_in_single_precision(
    objective: str, base: torch.dtype, taught: Any, attach: Any
) -> None:
    made, files = taught("sd15")
    pipe = copy.deepcopy(made)
    mixture = attach(pipe, files, lw.MoLE())
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(base)
    before = lessons.gates(mixture)
    data, options = (None, None) if objective == "guidance" else ([(lessons.picture(), "a")], lw.Denoising())
    found = lessons.train(
        mixture, data, options, steps=3, learning_rate=0.05, mixed_precision="bf16",
        gradient_checkpointing=objective == "guidance",
    )  # fmt: skip
    assert found.steps == 3
    assert all(math.isfinite(value) for entry in found.history for value in entry.values())
    after = lessons.gates(mixture)
    assert {gate.dtype for gate in after.values()} == {torch.float32}
    assert all(gate.isfinite().all() for gate in after.values())
    assert any((after[name] - before[name]).abs().max() > 0.01 for name in before)
    assert not torch.is_autocast_enabled("cpu")
    assert pipe.unet.dtype == base
