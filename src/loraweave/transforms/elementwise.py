"""Merging number by number: trim, drop, elect a sign, average what agrees.

The pieces of TIES and DARE as pure functions, and the five methods made of them. They work on any list of tensors of
one shape, so that the same method runs on deltas, on factors, or in an aligned space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Elementwise = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
DENSITY: dict[Elementwise, float] = {"magnitude_prune": 0.2, "ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
"""Default densities: TIES keeps the top 20 %; DARE's drop rate depends on the model, 0.5 is cautious."""

Draw = Callable[[int], torch.Generator]
"""Number of a tensor in the list -> where its random numbers come from."""


def combine(
    method: Elementwise, tensors: Sequence[Tensor], weights: Sequence[float], density: float, draw: Draw
) -> Tensor:
    """Merge tensors of one shape; the weights multiply what is left of each, before any vote.

    Args:
        method: which pieces to put together.
        tensors: one per expert.
        weights: one per expert.
        density: share of each tensor that is kept; ``linear`` keeps all.
        draw: random numbers for DARE.
    """
    if method in ("magnitude_prune", "ties"):
        tensors = [trim(tensor, density) for tensor in tensors]
    elif method in ("dare_linear", "dare_ties"):
        tensors = [drop(tensor, density, draw(number)) for number, tensor in enumerate(tensors)]
    weighed = torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)])
    return disjoint_mean(weighed) if method in ("ties", "dare_ties") else weighed.sum(0)


def trim(tensor: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of largest magnitude, at least one number, and set the others to zero."""
    # Floor, as others have it, but 0.29 * 100 is 29.
    count = min(tensor.numel(), max(1, int(density * tensor.numel() + 1e-9)))
    flat = tensor.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each number with probability ``density`` and divide it by that, so that the expectation stays (DARE)."""
    # Drawn in single precision on the processor: the same on every device and for every dtype.
    kept = torch.bernoulli(torch.full(tensor.shape, density, dtype=torch.float32), generator=generator)
    return tensor * kept.to(tensor) / density


def disjoint_mean(stack: Tensor) -> Tensor:
    """``[E, ...]`` -> ``[...]``: elect a sign for each number, average those that have it (TIES, Section 3).

    ``gamma = sgn(sum_i t_i)``; the mean is over the experts with ``sgn(t_i) = gamma``, so zeros do not dilute it. Where
    the sum is exactly zero nobody is elected and the result is zero.
    """
    elected = stack.sum(0).sign()
    agree = stack.sign() == elected
    mean: Tensor = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    return mean
