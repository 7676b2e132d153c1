"""Which weights a diffusion pipeline's models have now: by the step, by turns, or one expert for each copy of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError
from loraweave.mixing.stream import Canvas
from loraweave.mixing.types import Copies, Moment, Policy, Scheduled, Turns
from loraweave.mixing.variants import BARE

if TYPE_CHECKING:
    from loraweave.mixing.site import Site


@dataclass(frozen=True)
class Staging:
    """What the engine must know of a pipeline beyond its anatomy.

    Attributes:
        denoisers: paths of the models that are called at every step.
        encoders: paths of the text encoders.
        clock: the timestep that a denoiser is called with -> where in the run it is.
        canvas: a denoiser and a look-up of its call's arguments -> how its picture tokens are laid out, if they are.
        times: names by which denoisers take the timestep.
        unbatched: names of denoiser arguments whose first axis is never the rows.
        scales: names of arguments in which pipelines pass a strength for peft's own adapters.
    """

    denoisers: tuple[str, ...]
    encoders: tuple[str, ...]
    clock: Callable[[Any], Moment]
    canvas: Callable[[nn.Module, Callable[[str], Any]], Canvas | None]
    times: tuple[str, ...] = ()
    unbatched: frozenset[str] = frozenset()
    scales: tuple[str, ...] = ()


class Stage:
    """Applies policies that read the step, take turns, or run every row once per expert.

    Args:
        model: the module that ``staging``'s paths start from.
        staging: where the doors are; ``None`` for a model that is no part of a diffusion pipeline.

    Attributes:
        moving: whether the policy's weights follow a schedule.
        guided: whether a denoiser's door does more at a call than to look on.
    """

    def __init__(self, model: nn.Module, staging: Staging | None) -> None:
        self.staging = staging = staging or Staging((), (), _no_clock, _no_canvas)
        self.policy: Policy | None = None
        self.sites: tuple[Site, ...] = ()
        self.kept: Tensor | None = None
        self.moving = self.guided = False
        self.doors: list[RemovableHandle] = []
        if not (staging.denoisers or staging.encoders):
            return
        from loraweave.mixing.doors import DenoiserDoor, EncoderDoor  # needs what torch.compile needs: slow to import

        for path in staging.denoisers:
            module = model.get_submodule(path)
            door = DenoiserDoor(self, module, path)
            self.doors.append(module.register_forward_pre_hook(door.enter, with_kwargs=True))
            self.doors.append(module.register_forward_hook(door.leave))
        for path in staging.encoders:
            module = model.get_submodule(path)
            encoder = EncoderDoor(self, path)
            self.doors.append(module.register_forward_pre_hook(encoder.enter, with_kwargs=True))
            self.doors.append(module.register_forward_hook(encoder.leave))

    def check(self, policy: Policy, experts: Sequence[str], kept: Tensor | None) -> None:
        """Raise if under this mask nothing would be left of the policy."""
        names = [name for n, name in enumerate(experts) if kept is None or kept[n]]
        if isinstance(policy, Turns):
            policy.order_of(names)
        elif isinstance(policy, Copies):
            shares(policy, experts, kept)

    def set(self, policy: Policy, sites: Sequence[Site], kept: Tensor | None) -> None:
        """Take over a policy and its sites, with all experts but those ``kept`` masked."""
        self.policy, self.sites, self.kept = policy, tuple(sites), kept
        self.moving = isinstance(policy, Scheduled) and any(site.constant is None for site in sites)
        if isinstance(policy, Scheduled) and self.moving:
            self.weigh(lambda site: policy.at(site.plan, None))
        self.guided = self.moving or isinstance(policy, Turns | Copies)
        if not isinstance(policy, Turns | Copies):
            return
        vectors = [self.one_hot(owner) for owner in self.owners()]
        # Text encoders run all their readings at once; so does a denoiser whose rows are copied.
        for site in self.sites:
            if self.within(site, self.staging.encoders) or isinstance(policy, Copies):
                self.fix_copies(site, vectors)
            else:
                self.fix_copies(site, vectors[:1])

    def owners(self) -> tuple[int, ...]:
        """Numbers of the experts that the present policy runs alone at some time, in order."""
        policy, names = self.policy, self.names()
        if isinstance(policy, Turns):
            chosen = [names.index(name) for name in policy.order_of(self.remaining())]
            return (*chosen, BARE) if policy.pauses else tuple(chosen)
        assert isinstance(policy, Copies)
        return tuple(int(i) for i in self.shares().nonzero().flatten())

    def names(self) -> tuple[str, ...]:
        return self.sites[0].plan.experts

    def remaining(self) -> list[str]:
        """Names of the experts that are not masked."""
        kept = [True] * len(self.names()) if self.kept is None else self.kept.tolist()
        return [name for name, keep in zip(self.names(), kept, strict=True) if keep]

    def shares(self) -> Tensor:
        """``[E]``, summing to one: what each expert's estimate counts under the present mask."""
        assert isinstance(self.policy, Copies)
        return shares(self.policy, self.names(), self.kept)

    def one_hot(self, owner: int) -> Tensor:
        vector = torch.zeros(len(self.names()), dtype=torch.float64)
        if owner != BARE:
            vector[owner] = 1.0
        return vector

    @staticmethod
    def within(site: Site, paths: Sequence[str]) -> bool:
        return any(site.plan.members[0].startswith(f"{path}.") for path in paths)

    def fix_copies(self, site: Site, vectors: Sequence[Tensor]) -> None:
        for layer in site.layers:
            if len(vectors) > 1:
                layer.fix_copies(vectors)
            else:
                layer.fix(vectors[0])

    def weigh(
        self, weights: Callable[[Site], Tensor], within: Sequence[str] | None = None, whole: bool = False
    ) -> None:
        """Give the sites within some models constant weights, mask applied; those that have them already are left.

        Args:
            weights: of a site.
            within: paths of the models; ``None`` for all.
            whole: whether layers shall compute experts of weight zero, too.
        """
        for site in self.sites:
            if within is not None and not self.within(site, within):
                continue
            g = weights(site)
            g = g if self.kept is None or isinstance(self.policy, Turns) else g * self.kept
            for layer in site.layers:
                if layer.constant is None or layer.whole != whole or not torch.equal(layer.constant, g):
                    layer.fix(g, whole)

    def forget(self, path: str) -> None:
        """A pass of the model at ``path`` begins: no gate may use what was decided in another."""
        for site in self.sites:
            if site.gate is not None and self.within(site, [path]):
                site.clear()

    def close(self) -> None:
        for door in self.doors:
            door.remove()
        self.doors = []


def _no_clock(_: Any) -> Moment:
    raise LoraweaveError("this model is not called in denoising steps")


def _no_canvas(_: nn.Module, __: Callable[[str], Any]) -> None:
    """No picture."""


def shares(policy: Copies, experts: Sequence[str], kept: Tensor | None) -> Tensor:
    """``[E]``, summing to one: what each expert's estimate counts, masked ones left out.

    Raises:
        LoraweaveError: no expert that counts is left.
    """
    counted = policy.shares(experts)
    counted = counted if kept is None else counted * kept
    if float(counted.sum()) == 0:
        raise LoraweaveError("the experts kept have weight 0 in the average; nothing would be left")
    return counted / counted.sum()
