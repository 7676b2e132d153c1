"""A plain torch model, for mixtures where no host library is involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import loraweave as lw

WIDE, INNER, ENTRIES = 6, 5, 9
WIDTHS = {"embed": (ENTRIES, WIDE), "up": (WIDE, INNER), "down": (INNER, WIDE)}


class Toy(nn.Module):
    """Embedding, two projections, a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ENTRIES, WIDE)
        self.up = nn.Linear(WIDE, INNER)
        self.down = nn.Linear(INNER, WIDE)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        return x + self.down(torch.tanh(self.up(x)))


def experts(ranks: Mapping[str, Sequence[int]], scales: Sequence[float], seed: int = 0) -> dict[str, lw.Expert]:
    """Experts with these ranks at each module (0: does not touch it) and these scales."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, lw.LoraFactors]] = {f"e{i}": {} for i in range(len(scales))}
    for module, here in ranks.items():
        wide, out = WIDTHS[module]
        for i, rank in enumerate(here):
            if rank:
                A = torch.randn(rank, wide, generator=generator, dtype=torch.float64)
                B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
                made[f"e{i}"][module] = lw.LoraFactors(A, B, scales[i], module == "embed")
    return {name: lw.Expert(name, factors) for name, factors in made.items()}


def slow(experts: Mapping[str, lw.Expert], weights: Sequence[float], ids: Tensor) -> Tensor:
    """What a :class:`Toy` with constant mixing weights gives, by explicit loops."""
    toy = Toy().double()

    def term(module: str, x: Tensor) -> Tensor:
        total = torch.zeros(*x.shape[: ids.ndim], WIDTHS[module][1], dtype=torch.float64)
        for g, expert in zip(weights, experts.values(), strict=True):
            f = expert.factors.get(module)
            if f is not None:
                a = f.A.T[x] if f.embedding else torch.stack([x @ row for row in f.A], -1)
                total += g * f.scale * torch.stack([a @ row for row in f.B], -1)
        return total

    x = toy.embed(ids) + term("embed", ids)
    h = torch.tanh(toy.up(x) + term("up", x))
    return x + toy.down(h) + term("down", h)
