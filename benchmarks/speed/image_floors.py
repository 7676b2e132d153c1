"""The least that a mixture of LoRAs in a denoiser can do: its floors, and their arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from speed.denoisers import ImageBench, StandIn, targets
from speed.peers import FloorLinear


class GroupsLinear(nn.Module):
    """The base product of all rows, and for each group of rows the two products of one LoRA. Inference only."""

    def __init__(self, base: nn.Linear, pairs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.base, self.pairs = base, [(A.T, B.T.contiguous()) for A, B in pairs]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for part, seen, (At, Bt) in zip(y.chunk(len(self.pairs)), x.chunk(len(self.pairs)), self.pairs, strict=True):
            part.view(-1, part.shape[-1]).addmm_(seen.reshape(-1, seen.shape[-1]) @ At, Bt)
        return y


class Repeated(StandIn):
    """A denoiser that is given every row ``times`` times, and the mean of its estimates."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__(inner)
        self.times = times

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        def more(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.dim() > 0
            return value.repeat(self.times, *[1] * (value.dim() - 1)) if rows else value

        args, kwargs = tree_map(more, (args, kwargs))
        (estimates,) = self.inner(*args, **kwargs)
        return (torch.stack(estimates.chunk(self.times)).mean(dim=0),)


def dense(bench: ImageBench) -> Any:
    """All LoRAs in every row: at each module the base product and two stacked ones, as in ``peers.floor``."""

    def stacked(base: nn.Linear, pairs: list[tuple[Tensor, Tensor]]) -> nn.Module:
        A, Bt = torch.cat([A for A, _ in pairs]), torch.cat([B.T for _, B in pairs])
        return FloorLinear(base, A, Bt.contiguous())

    return _with(bench, stacked)


def composite(bench: ImageBench) -> Any:
    """One LoRA a row: N times the rows in one call, in each the bare denoiser and two products a module."""
    pipe = _with(bench, GroupsLinear)
    setattr(pipe, bench.size.part, Repeated(getattr(pipe, bench.size.part), len(bench.files)))
    return pipe


def arithmetic(bench: ImageBench, call: Callable[[Any, ImageBench], object]) -> dict[str, float]:
    """What one step of a dense mixture cannot do without, counted while it runs: convolutions, products, attention.

    Args:
        bench: the denoiser and its LoRAs.
        call: runs a pipeline of a bench for ``size.steps``.

    Returns:
        ``base_gflop`` and ``lora_gflop`` of one step with guidance, two rows; ``base_mb`` and ``lora_mb`` of weights
        read for it; ``ratio``: (base + LoRA) / base of the FLOPs.
    """

    def flops(pipe: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            call(pipe, dataclasses.replace(bench, size=dataclasses.replace(bench.size, steps=1)))
        return counter.get_total_flops()

    base, full = flops(bench.pipe()), flops(dense(bench))
    factors = sum(tensor.nbytes for file in bench.files.values() for tensor in load_file(file).values())
    return {
        "base_gflop": 1e-9 * base,
        "lora_gflop": 1e-9 * (full - base),
        "base_mb": 1e-6 * sum(parameter.nbytes for parameter in bench.denoiser.parameters()),
        "lora_mb": 1e-6 * factors,
        "ratio": full / base,
    }


def _product(*shapes: Sequence[int], **_: Any) -> int:
    _, (rows, width), (_, out) = shapes
    return 2 * rows * width * out


def _attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


# What torch's counter leaves out.
UNCOUNTED = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def _with(bench: ImageBench, made: Callable[[nn.Linear, list[tuple[Tensor, Tensor]]], nn.Module]) -> Any:
    """A pipeline with ``made(module, [(A, B), ...])`` in place of every target."""
    pipe = bench.pipe()
    denoiser = getattr(pipe, bench.size.part)
    files = [bench.place.take(load_file(file)) for file in bench.files.values()]
    for path, base in list(targets(denoiser)):
        key = f"{bench.size.part}.{path}"
        pairs = [(file[f"{key}.lora_A.weight"], file[f"{key}.lora_B.weight"]) for file in files]
        denoiser.set_submodule(path, made(base, pairs))
    return pipe
