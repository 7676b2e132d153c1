"""The doors of denoisers and text encoders: what is done to their calls while a mixture is attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from loraweave.errors import LoraweaveError
from loraweave.mixing.stream import Arguments
from loraweave.mixing.types import Copies, Moment, Scheduled, Turns
from loraweave.mixing.variants import BARE, join, pick

if TYPE_CHECKING:
    from loraweave.mixing.denoiser import Stage

F = TypeVar("F", bound=Callable[..., Any])

# What differs from call to call stays out of the graphs of torch.compile, which else would differ, too.
apart = cast(Callable[[F], F], torch.compiler.disable)
# The same, but what it calls is compiled.
apart_alone = cast(Callable[[F], F], partial(torch.compiler.disable, recursive=False))


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
        if self.stage.guided:
            return self.prepare_apart(module, args, kwargs, torch.compiler.is_compiling())
        return self.prepare(module, args, kwargs, False)

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> Any:
        """Give the layers this call's weights, and return the call's arguments as they shall be."""
        self.refuse_scale(args, kwargs)
        self.stage.forget(self.path)
        stage, policy = self.stage, self.stage.policy
        owners: tuple[int, ...] = ()
        if isinstance(policy, Turns):
            name = policy.turn(stage.remaining(), self.moment(args, kwargs))
            owner = BARE if name is None else stage.names().index(name)
            owners = (owner,)
            stage.weigh(lambda _: stage.one_hot(owner), [self.path])
        elif isinstance(policy, Scheduled) and stage.moving:
            moment = self.moment(args, kwargs)
            stage.weigh(lambda site: policy.at(site.plan, moment), [self.path], whole=compiled)
        elif isinstance(policy, Copies):
            everyone = stage.owners()
            size = policy.chunk or len(everyone)
            self.passes = [everyone[i : i + size] for i in range(0, len(everyone), size)]
            owners = self.passes[0]
            self.fix(owners)
        self.note_canvas(module, args, kwargs)
        self.call = (args, kwargs)
        return self.expanded(owners)

    prepare_apart = apart(prepare)

    def moment(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        """Where in the denoising run a call with these arguments is."""
        assert self.stage.policy is not None
        given = (self.arguments.get(name, args, kwargs) for name in self.stage.staging.times)
        timestep = next((time for time in given if time is not None), None)
        if timestep is None:
            raise LoraweaveError(
                f"{self.path}: is called without a timestep, so the denoising step is unknown; "
                f"{self.stage.policy.name!r} cannot follow it, methods that do not depend on the step can"
            )
        return self.stage.staging.clock(timestep)

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
        here = [
            site
            for site in self.stage.sites
            if getattr(site.gate, "reads_canvas", False) and site.stream.spec.door == self.path
        ]
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
        if isinstance(self.stage.policy, Copies):
            return self.go_on(module, output)
        self.call = ((), {})
        return None

    @apart_alone
    def go_on(self, module: nn.Module, output: Any) -> Any:
        """Run the other chunks, if there are any, and return the mean of all estimates."""
        total = self.weighed(output, self.passes[0])
        self.inner = True
        try:
            for owners in self.passes[1:]:
                args, kwargs = self.next_chunk(owners)
                total = self.added(total, self.weighed(module(*args, **kwargs), owners))
        finally:
            self.inner = False
            self.call = ((), {})
        return total

    @apart
    def next_chunk(self, owners: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.fix(owners)
        return self.expanded(owners)

    @apart
    def added(self, total: Any, more: Any) -> Any:
        return tree_map(lambda a, b: a + b if isinstance(a, Tensor) else a, total, more)

    @apart
    def weighed(self, output: Any, owners: tuple[int, ...]) -> Any:
        """The weighted sum of these experts' estimates, ``[copies * rows, ...] -> [rows, ...]``."""
        shares = self.stage.shares()[list(owners)]

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
