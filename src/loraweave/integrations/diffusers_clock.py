"""Which denoising step it is, told from what a denoiser is called with and what the pipeline's scheduler says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.mixing.types import Moment


class StepClock:
    """Counts denoising steps.

    A step begins when the denoiser is called with another time than before, or the scheduler has made a step since
    (in half precision two times may look alike), unless a solver of second order is half-way through. So it matters
    little in which form a pipeline passes the time: ``t``, ``t / 1000`` (Flux), ``1 - t / 1000`` (Lumina 2, Z-Image),
    an angle (Sana Sprint), one for each token (Wan, LTX).

    A run begins when the scheduler was given new timesteps, as every call of a pipeline does; and, for pipelines that
    share the models but have a scheduler of their own, when the time turns back.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.times: Tensor | None = None
        self.step, self.steps, self.halfway = 0, 1, False
        self.last: float = 0.0
        self.index: int | None = None
        self.rising: bool | None = None
        self.straight = True

    def __call__(self, timestep: Any) -> Moment:
        scheduler = getattr(self.pipe, "scheduler", None)
        times = getattr(scheduler, "timesteps", None)
        if not isinstance(times, Tensor) or not times.numel():
            raise LoraweaveError(
                f"{type(self.pipe).__name__}: its scheduler has no timesteps yet, so the denoising step is unknown; "
                "call the pipeline, or scheduler.set_timesteps first"
            )
        # Tokens of a given picture have no noise, and so a time of 0, in every step.
        t = float(timestep.detach().max() if isinstance(timestep, Tensor) else timestep)
        halfway = getattr(scheduler, "state_in_first_order", True) is False
        index = getattr(scheduler, "step_index", None)
        if times is not self.times or self._turned_back(t):
            self._begin(scheduler, times, t)
        else:
            if t != self.last and self.rising is None:
                self.rising = t > self.last
            # The second half of a step may be at the next step's timestep, which then begins with the same one.
            if not halfway and (t != self.last or index != self.index or self.halfway):
                self.step += 1
        self.last, self.index, self.halfway = t, index, halfway
        return Moment(self.step, max(self.steps, self.step))

    def _turned_back(self, t: float) -> bool:
        return self.rising is not None and self.straight and t != self.last and (t > self.last) != self.rising

    def _begin(self, scheduler: Any, times: Tensor, t: float) -> None:
        self.times, self.step, self.rising = times, 1, None
        self.steps = _steps(scheduler, times[_start(scheduler, times, t) :])
        ways = times.detach().float().diff().sign()
        self.straight = not bool((ways > 0).any() and (ways < 0).any())  # RePaint goes back and forth


def _start(scheduler: Any, times: Tensor, t: float) -> int:
    """At which of the scheduler's timesteps a run begins that first calls its denoiser with ``t``."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None and 0 <= begin < len(times):
        return int(begin)
    total = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
    forms = [t * total, total - t * total, t] if 0 <= t <= 1 else [t]
    found = [place for form in forms if (place := _index(times, form)) is not None]
    # 1 may be the first of 1000 divided, or the very last; runs that begin with the last are rare.
    return 0 if 0 in found or not found else found[0]


def _index(times: Tensor, t: float) -> int | None:
    """Where among the timesteps ``t`` stands, compared in half precision's steps: it may have been cast on its way."""
    apart = (times.detach().float().cpu() - t).abs()
    nearest = int(apart.argmin())
    return nearest if float(apart[nearest]) <= 1e-2 + 4e-3 * abs(t) else None


def _steps(scheduler: Any, times: Tensor) -> int:
    if hasattr(scheduler, "state_in_first_order"):
        return (len(times) + 1) // 2
    # Without an index the clock goes by the timesteps alone; PNDM has one of them twice.
    return len(times) if hasattr(scheduler, "step_index") else len(torch.unique(times))
