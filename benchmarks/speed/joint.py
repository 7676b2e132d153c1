"""Would one product for the projections that share an input pay? ``python benchmarks/speed/joint.py``

The low-rank terms of a decoder of 12 layers, 768 wide, 8 experts of rank 16, as plain tensors: the ``A`` of query, key
and value (and of the feed-forward part's two) in products of their own, as loraweave has them, or stacked in one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

LAYERS, WIDTH, INNER, ROWS = 12, 768, 2048, 128
SHAPES = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {
    "gate": (INNER, WIDTH),
    "up": (INNER, WIDTH),
    "down": (WIDTH, INNER),
}


class Layer(NamedTuple):
    """Weights ``[out, in]`` and factors by projection; ``together`` stacks the ``A`` of those that share an input."""

    W: dict[str, Tensor]
    A: dict[str, Tensor]
    Bt: dict[str, Tensor]
    together: dict[str, Tensor]


def make(generator: torch.Generator) -> Layer:
    W = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in SHAPES.items()}
    A = {name: torch.randn(ROWS, shape[1], generator=generator) * shape[1] ** -0.5 for name, shape in SHAPES.items()}
    Bt = {name: torch.randn(ROWS, shape[0], generator=generator) * 0.01 for name, shape in SHAPES.items()}
    together = {part: torch.cat([A[name] for name in part.split()]) for part in ("q k v", "gate up")}
    return Layer(W, A, Bt, together)


def run(layers: list[Layer], x: Tensor, project: Callable[[Layer, str, Tensor], list[Tensor]]) -> Tensor:
    """All projections of a decoder, without what stands between them."""
    for layer in layers:
        q, k, v = project(layer, "q k v", x)
        (o,) = project(layer, "o", q + k + v)
        gate, up = project(layer, "gate up", o)
        x = x + 0.01 * project(layer, "down", gate * up)[0]
    return x


def bare(layer: Layer, part: str, x: Tensor) -> list[Tensor]:
    return [linear(x, layer.W[name]) for name in part.split()]


def mixed(w: Tensor, together: bool) -> Callable[[Layer, str, Tensor], list[Tensor]]:
    """With the low-rank terms; ``w``, ``[tokens, rows]``, are the experts' weights."""

    def project(layer: Layer, part: str, x: Tensor) -> list[Tensor]:
        names = part.split()
        if together and part in layer.together:
            shared = linear(x, layer.together[part]).view(-1, len(names), ROWS) * w.unsqueeze(1)
            terms = list(shared.unbind(1))
        else:
            terms = [linear(x, layer.A[name]) * w for name in names]
        return [linear(x, layer.W[name]).addmm_(a, layer.Bt[name]) for name, a in zip(names, terms, strict=True)]

    return project


def measure(tokens: int, rounds: int, calls: int) -> dict[str, float]:
    """Medians over rounds of the time as a multiple of the bare projections' in the same round."""
    generator = torch.Generator().manual_seed(0)
    layers = [make(generator) for _ in range(LAYERS)]
    x, w = torch.randn(tokens, WIDTH, generator=generator), torch.rand(tokens, ROWS, generator=generator)
    ways = {"bare": bare, "apart": mixed(w, together=False), "together": mixed(w, together=True)}
    torch.testing.assert_close(run(layers, x, ways["apart"]), run(layers, x, ways["together"]), atol=1e-3, rtol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.perf_counter()
            for _ in range(calls):
                run(layers, x, ways[name])
            seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(one / base for one, base in zip(each, seconds["bare"], strict=True))
        for name, each in seconds.items()
    }


def main() -> None:
    """Prints one line a number of tokens."""
    torch.set_num_threads(2)
    with torch.inference_mode():
        for tokens, calls in ((1, 20), (8, 10), (512, 2)):
            found = measure(tokens, 12, calls)
            print(f"{tokens} tokens: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items()))


if __name__ == "__main__":
    main()
