"""The doors of a diffusion pipeline's models: what step it is, whose turn, and one run of the rows per expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError
from loraweave.mixing.stream import Arguments, Canvas
from loraweave.mixing.types import Copies, Moment, Policy, Scheduled, Turns
from loraweave.mixing.variants import BARE, join, pick

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
        unbatched: names of denoiser arguments whose first axis is never the rows.
        scales: names of arguments in which pipelines pass a strength for peft's own adapters.
    """

    denoisers: tuple[str, ...]
    encoders: tuple[str, ...]
    clock: Callable[[Any], Moment]
    canvas: Callable[[nn.Module, Callable[[str], Any]], Canvas | None]
    unbatched: frozenset[str] = frozenset()
    scales: tuple[str, ...] = ()


class Stage:
    """Applies policies that read the step, take turns, or run every row once per expert.

    Args:
        model: the module that ``staging``'s paths start from.
        staging: where the doors are; ``None`` for a model that is no part of a diffusion pipeline.
    """

    def __init__(self, model: nn.Module, staging: Staging | None) -> None:
        self.staging = staging = staging or Staging((), (), _no_clock, _no_canvas)
        self.policy: Policy | None = None
        self.sites: tuple[Site, ...] = ()
        self.kept: Tensor | None = None
        self.moving = False
        self.doors: list[RemovableHandle] = []
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

    def weigh(self, weights: Callable[[Site], Tensor], within: Sequence[str] | None = None) -> None:
        """Give the sites within some models constant weights, mask applied; those that have them already are left."""
        for site in self.sites:
            if within is not None and not self.within(site, within):
                continue
            g = weights(site)
            g = g if self.kept is None or isinstance(self.policy, Turns) else g * self.kept
            for layer in site.layers:
                if layer.constant is None or not torch.equal(layer.constant, g):
                    layer.fix(g)

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


class DenoiserDoor:
    """Stands at a denoiser's door; its methods are the hooks."""

    def __init__(self, stage: Stage, module: nn.Module, path: str) -> None:
        self.stage, self.path = stage, path
        self.arguments = Arguments(module)
        self.names = self.arguments.names()
        self.passes: list[tuple[int, ...]] = []
        self.inner = False
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.rows = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inner:
            return None
        self.refuse_scale(args, kwargs)
        self.stage.forget(self.path)
        stage, policy = self.stage, self.stage.policy
        owners: tuple[int, ...] = ()
        if isinstance(policy, Turns) or (isinstance(policy, Scheduled) and stage.moving):
            timestep = self.arguments.get("timestep", args, kwargs)
            if timestep is None:
                raise LoraweaveError(
                    f"{self.path}: is called without 'timestep', so the denoising step is unknown; {policy.name!r} "
                    "cannot follow it, methods that do not depend on the step can"
                )
            moment = stage.staging.clock(timestep)
            if isinstance(policy, Turns):
                name = policy.turn(stage.remaining(), moment)
                owner = BARE if name is None else stage.names().index(name)
                owners = (owner,)
                stage.weigh(lambda _: stage.one_hot(owner), [self.path])
            else:
                stage.weigh(lambda site: policy.at(site.plan, moment), [self.path])
        elif isinstance(policy, Copies):
            everyone = stage.owners()
            size = policy.chunk or len(everyone)
            self.passes = [everyone[i : i + size] for i in range(0, len(everyone), size)]
            owners = self.passes[0]
            self.fix(owners)
        self.note_canvas(module, args, kwargs)
        self.call = (args, kwargs)
        return self.expanded(owners)

    def refuse_scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in self.stage.staging.scales:
            given = self.arguments.get(name, args, kwargs)
            scale = given.get("scale", 1.0) if isinstance(given, Mapping) else 1.0
            if scale != 1.0:
                raise LoraweaveError(
                    f"{name}={{'scale': {scale}}} is for adapters loaded by diffusers and has no effect on a mixture; "
                    f"set the weight in the policy instead, e.g. mixture.policy = lw.Sum({scale})"
                )

    def note_canvas(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spatial = [site for site in self.stage.sites if site.plan.spatial and site.gate is not None]
        here = [site for site in spatial if site.stream.spec.door == self.path]
        if here:
            canvas = self.stage.staging.canvas(module, lambda name: self.arguments.get(name, args, kwargs))
            for site in here:
                site.stream.canvas = canvas

    def fix(self, owners: tuple[int, ...]) -> None:
        """Under chunks: let the layers expect this chunk's experts."""
        if len(self.passes) > 1:
            vectors = [self.stage.one_hot(owner) for owner in owners]
            for site in self.stage.sites:
                if self.stage.within(site, [self.path]):
                    self.stage.fix_copies(site, vectors)

    def expanded(self, owners: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with the rows repeated for each owner, prompts as that owner reads them."""
        args, kwargs = self.call
        sample = args[0] if args else kwargs.get(self.names[0])
        if isinstance(sample, Tensor):
            self.rows = sample.shape[0]
        elif isinstance(self.stage.policy, Copies):
            raise LoraweaveError(
                f"{self.path}: its first argument {self.names[0]!r} is {type(sample).__name__}, expected a tensor of "
                f"rows; {self.stage.policy.name!r} cannot run it once per expert, other methods can"
            )
        unbatched = self.stage.staging.unbatched
        named = zip(self.names, args, strict=False)
        return (
            tuple(self.expand(value, owners, name not in unbatched) for name, value in named),
            {name: self.expand(value, owners, name not in unbatched) for name, value in kwargs.items()},
        )

    def expand(self, value: Any, owners: tuple[int, ...], batched: bool) -> Any:
        def leaf(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            if not owners:
                return refuse_variants(tensor)
            if len(owners) == 1 or not batched or not tensor.ndim or tensor.shape[0] != self.rows:
                return pick(tensor, owners[0])
            return torch.cat([pick(tensor, owner) for owner in owners])

        return tree_map(leaf, value)

    def leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if self.inner:
            return None
        if not isinstance(self.stage.policy, Copies):
            self.call = ((), {})
            return None
        shares = self.stage.shares()
        total = self.weighed(output, shares[list(self.passes[0])])
        self.inner = True
        try:
            for owners in self.passes[1:]:
                self.fix(owners)
                args, kwargs = self.expanded(owners)
                more = self.weighed(module(*args, **kwargs), shares[list(owners)])
                total = tree_map(lambda a, b: a + b if isinstance(a, Tensor) else a, total, more)
        finally:
            self.inner = False
            self.call = ((), {})
        return total

    def weighed(self, output: Any, shares: Tensor) -> Any:
        """The weighted sum of the copies' estimates, ``[copies * rows, ...] -> [rows, ...]``."""

        def leaf(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            copies = tensor.view(len(shares), self.rows, *tensor.shape[1:])
            return torch.tensordot(shares.to(tensor), copies, dims=1)

        return tree_map(leaf, output)


class EncoderDoor:
    """Stands at a text encoder's door: encodes a prompt once per reading, if any expert extends the encoder."""

    def __init__(self, stage: Stage, path: str) -> None:
        self.stage, self.path = stage, path

    def owners(self) -> tuple[int, ...]:
        touched = any(self.stage.within(site, [self.path]) for site in self.stage.sites)
        return self.stage.owners() if touched and isinstance(self.stage.policy, Turns | Copies) else ()

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stage.forget(self.path)
        copies = len(self.owners())
        if copies < 2:
            return None
        return tree_map(
            lambda x: x.repeat(copies, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) and x.ndim else x, (args, kwargs)
        )

    def leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        owners = self.owners()
        if len(owners) < 2:
            return None
        return tree_map(lambda x: join(owners, x.chunk(len(owners))) if isinstance(x, Tensor) and x.ndim else x, output)


def refuse_variants(tensor: Tensor) -> Tensor:
    """The tensor, unless it holds readings of experts: nobody in particular is to read it now."""
    plain: Tensor = pick(tensor, BARE - 1)
    return plain
