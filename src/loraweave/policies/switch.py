"""Switch: one expert at a time, in turns along the denoising run (Multi-LoRA Composition)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from loraweave.errors import LoraweaveError, unknown
from loraweave.mixing.types import Moment, SitePlan
from loraweave.policies import checks
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Switch:
    """At denoising step ``t`` only expert ``floor(((t-1) mod N tau) / tau)`` is at work, at weight 1.

    Every expert reads its own encoding of the prompt, made under its own text-encoder LoRA: at each step the pipeline
    computes what it would with that one LoRA loaded. (The published code encodes it once, under the first LoRA.)

    Args:
        every: ``tau``, steps of each turn.
        order: experts in the order of their turns; those left out have none. Default: the mixture's order.
        start: fraction of the run before which the bare model is at work; turns are counted from there.
        stop: fraction of the run from which on the bare model is at work.
    """

    every: int = 5
    order: Sequence[str] | None = None
    start: float = 0.0
    stop: float = 1.0

    name: ClassVar[str] = "switch"
    source: ClassVar[str] = "https://arxiv.org/abs/2402.16843"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = True
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise LoraweaveError(f"switch every: expected a whole number of steps, at least 1, got {self.every!r}")
        if self.order is not None:
            if isinstance(self.order, str) or not self.order or len(set(self.order)) < len(self.order):
                raise LoraweaveError(f"switch order: expected names of experts, each once, got {self.order!r}")
            object.__setattr__(self, "order", tuple(self.order))
        checks.finite(self.name, "start", self.start)
        checks.finite(self.name, "stop", self.stop)
        if not 0 <= self.start < self.stop <= 1:
            raise LoraweaveError(
                f"switch start, stop: expected fractions of the run with 0 <= start < stop <= 1, got {self.start:g}, "
                f"{self.stop:g}"
            )

    @property
    def pauses(self) -> bool:
        return self.start > 0 or self.stop < 1

    def check(self, sites: Sequence[SitePlan]) -> None:
        for name in self.order or ():
            if name not in sites[0].experts:
                raise unknown("expert", name, sites[0].experts)

    def order_of(self, experts: Sequence[str]) -> Sequence[str]:
        chosen = [name for name in self.order or experts if name in experts]
        if not chosen:
            raise LoraweaveError(f"switch: none of the experts kept ({', '.join(experts)}) has a turn")
        return chosen

    def turn(self, experts: Sequence[str], moment: Moment) -> str | None:
        first, last = math.ceil(self.start * moment.steps), math.ceil(self.stop * moment.steps)
        if not first < moment.step <= last:
            return None
        order = self.order_of(experts)
        return order[(moment.step - 1 - first) % (len(order) * self.every) // self.every]

    def constant(self, site: SitePlan) -> None:
        """It depends on the step."""

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned."""
