"""Denoising steps are counted as users count them, whatever the scheduler calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import loraweave as lw
from loraweave.integrations.diffusers_clock import StepClock
from loraweave.mixing.types import Moment

FORMS: dict[str, Any] = {
    "plain": lambda t: t, "per-thousand": lambda t: t / 1000, "rest": lambda t: 1 - t / 1000,
    "angle": lambda t: torch.sin(t / 1000) / (torch.sin(t / 1000) + torch.cos(t / 1000)),
}  # fmt: skip


def seen(scheduler: Any, clock: StepClock, start: int = 0, form: Any = None) -> list[tuple[int, int]]:
    """Step and number of steps at every evaluation of a run."""
    moments, form = [], form or (lambda t: t)
    sample = torch.zeros(1, 1, 2, 2)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        moment = clock(form(t).expand(2))
        moments.append((moment.step, moment.steps))
        assert clock(form(t)) == moment  # a second call of the denoiser in the same step
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "FlowMatchHeunDiscrete"])
def test_two_evaluations_are_one_step(kind: str, form: str) -> None:
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    scheduler.set_timesteps(4)
    found = seen(scheduler, StepClock(SimpleNamespace(scheduler=scheduler)), form=FORMS[form])
    assert found == [(n // 2 + 1, 4) for n in range(7)]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_time(form: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    clock = StepClock(SimpleNamespace(scheduler=scheduler))
    for start in (0, 2):
        scheduler.set_timesteps(5)
        assert seen(scheduler, clock, start, FORMS[form]) == [(n, 5 - start) for n in range(1, 6 - start)]


def test_steps_whose_times_look_alike_in_half_precision() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    scheduler.set_timesteps(60)
    assert len(scheduler.timesteps.bfloat16().unique()) < 60
    found = seen(scheduler, StepClock(SimpleNamespace(scheduler=scheduler)), form=torch.Tensor.bfloat16)
    assert found == [(n, 60) for n in range(1, 61)]


def test_tokens_of_a_given_picture_have_no_time() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(5)
    given = torch.tensor([0.0, 1.0])
    found = seen(scheduler, StepClock(SimpleNamespace(scheduler=scheduler)), form=lambda t: given * t)
    assert found == [(n, 5) for n in range(1, 6)]


def test_a_pipeline_with_a_scheduler_of_its_own_is_followed() -> None:
    """Even one whose timesteps are among those of the pipeline that was attached to."""
    other, known = diffusers.DDIMScheduler(), diffusers.DDIMScheduler()
    clock = StepClock(SimpleNamespace(scheduler=known))
    other.set_timesteps(4)
    for _ in range(2):
        assert [clock(t).step for t in other.timesteps] == [1, 2, 3, 4]


def test_a_scheduler_without_timesteps_is_an_error() -> None:
    clock = StepClock(SimpleNamespace(scheduler=None))
    with pytest.raises(lw.LoraweaveError, match="no timesteps yet"):
        clock(torch.tensor(3))
