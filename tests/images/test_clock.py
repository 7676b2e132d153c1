"""Denoising steps are counted as users count them, whatever the scheduler calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import loraweave as lw
from loraweave.integrations.diffusers import StepClock
from loraweave.mixing.types import Moment


def seen(scheduler: Any, clock: StepClock, start: int = 0, per_thousand: bool = False) -> list[tuple[int, int]]:
    """Step and number of steps at every evaluation of a run."""
    moments = []
    sample = torch.zeros(1, 1, 2, 2)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        moment = clock((t / 1000 if per_thousand else t).expand(2))
        moments.append((moment.step, moment.steps))
        assert clock(t / 1000 if per_thousand else t) == moment  # a second call of the denoiser in the same step
        sample = scheduler.step(torch.ones_like(sample), t, sample).prev_sample
    return moments


def test_one_evaluation_a_step_and_a_run_that_begins_late() -> None:
    scheduler = diffusers.DDIMScheduler()
    clock = StepClock(SimpleNamespace(scheduler=scheduler))
    for start in (0, 4, 4):
        scheduler.set_timesteps(10)
        assert seen(scheduler, clock, start) == [(n, 10 - start) for n in range(1, 11 - start)]


def test_an_abandoned_run_is_forgotten() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    clock = StepClock(SimpleNamespace(scheduler=scheduler))
    scheduler.set_timesteps(10)
    assert clock(scheduler.timesteps[0]) == Moment(1, 10)
    assert clock(scheduler.timesteps[1]) == Moment(2, 10)
    scheduler.set_timesteps(10)
    assert clock(scheduler.timesteps[6]) == Moment(1, 4)


@pytest.mark.parametrize("kind", [diffusers.HeunDiscreteScheduler, diffusers.KDPM2DiscreteScheduler])
def test_two_evaluations_are_one_step(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    found = seen(scheduler, StepClock(SimpleNamespace(scheduler=scheduler)))
    assert found == [(n // 2 + 1, 4) for n in range(7)]


def test_timesteps_divided_by_a_thousand() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    found = seen(scheduler, StepClock(SimpleNamespace(scheduler=scheduler)), per_thousand=True)
    assert found == [(n, 5) for n in range(1, 6)]


def test_a_scheduler_without_timesteps_is_an_error() -> None:
    clock = StepClock(SimpleNamespace(scheduler=None))
    with pytest.raises(lw.LoraweaveError, match="no timesteps yet"):
        clock(torch.tensor(3))
