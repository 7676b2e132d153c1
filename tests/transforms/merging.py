"""Small experts to merge, and the merges written as the papers' equations say: one number after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import loraweave as lw

SHAPES = {"block.q": (7, 5), "block.v": (7, 6), "head": (4, 9)}
"""Module -> (in, out)."""


def expert(
    name: str, modules: Mapping[str, int], scale: float = 1.0, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> lw.Expert:
    """An expert with random factors: module -> rank."""
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for path, rank in modules.items():
        wide, out = SHAPES[path]
        A = torch.randn(rank, wide, generator=random, dtype=torch.float64)
        B = torch.randn(out, rank, generator=random, dtype=torch.float64)
        factors[path] = lw.LoraFactors(A.to(dtype), B.to(dtype), scale)
    return lw.Expert(name, factors)


def trio() -> dict[str, lw.Expert]:
    """Three experts of different ranks, scales and targets; at ``block.q`` all meet."""
    return {
        "ant": expert("ant", {"block.q": 2, "block.v": 1}, 1.5, seed=1),
        "bee": expert("bee", {"block.q": 3, "head": 2}, 0.4, seed=2),
        "cat": expert("cat", {"block.q": 1, "block.v": 2}, -2.0, seed=3),
    }


def alike(scales: Sequence[float] = (1.5, 0.4, 2.0)) -> dict[str, lw.Expert]:
    """Three experts of equal ranks."""
    modules = {"block.q": 2, "head": 2}
    return {
        name: expert(name, modules, scale, seed=10 + n)
        for n, (name, scale) in enumerate(zip(("ant", "bee", "cat"), scales, strict=True))
    }


def dense(merged: lw.Expert | lw.LoraFactors, path: str | None = None) -> Tensor:
    """``s B A`` of a module."""
    f = merged.factors[str(path)] if isinstance(merged, lw.Expert) else merged
    return f.scale * f.B.double() @ f.A.double()


def paths(experts: Mapping[str, lw.Expert]) -> list[str]:
    return sorted({path for one in experts.values() for path in one.factors})


def deltas(experts: Mapping[str, lw.Expert], path: str) -> dict[str, Tensor]:
    """Name -> dense delta, of the experts that extend the module."""
    return {name: dense(one, path) for name, one in experts.items() if path in one.factors}


def total(experts: Mapping[str, lw.Expert], path: str, weights: Mapping[str, float]) -> Tensor:
    """``sum_i w_i s_i B_i A_i``, summed over ranks by hand."""
    wide, out = SHAPES[path]
    result = torch.zeros(out, wide, dtype=torch.float64)
    for name, one in experts.items():
        if path in one.factors:
            f = one.factors[path]
            for k in range(f.rank):
                result += weights.get(name, 1.0) * f.scale * torch.outer(f.B[:, k].double(), f.A[k].double())
    return result


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


# ---------------------------------------------------------------- number by number


def slow_trim(matrix: Tensor, density: float) -> Tensor:
    """All but the largest numbers set to zero."""
    numbers = [(abs(float(x)), place) for place, x in enumerate(matrix.flatten())]
    count = max(1, int(density * len(numbers) + 1e-9))
    kept = {place for _, place in sorted(numbers, reverse=True)[:count]}
    flat = [float(x) if place in kept else 0.0 for place, x in enumerate(matrix.flatten())]
    return torch.tensor(flat, dtype=torch.float64).view_as(matrix)


def slow_elect(matrices: Sequence[Tensor]) -> Tensor:
    """TIES' last two steps, for matrices that are weighed and trimmed already."""
    result = torch.zeros_like(matrices[0])
    for place in range(result.numel()):
        numbers = [float(matrix.flatten()[place]) for matrix in matrices]
        total = sum(numbers)
        agreeing = [x for x in numbers if (x > 0 and total > 0) or (x < 0 and total < 0)]
        if agreeing:
            result.view(-1)[place] = sum(agreeing) / len(agreeing)
    return result


def slow_ties(matrices: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    return slow_elect([w * slow_trim(m, density) for m, w in zip(matrices, weights, strict=True)])
