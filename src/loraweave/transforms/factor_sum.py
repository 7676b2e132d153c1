"""Sums of LoRA factors, as LoRAHub's and PEM's published code computes them: ``(sum w B)(sum w A)``.

The papers' equations add the products ``B_i A_i``; adding factors brings in cross terms ``w_i w_j B_i A_j``, and needs
equal ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert, LoraFactors
from loraweave.mixing.layer import MixingLayer


def check_alike(layers: Mapping[str, MixingLayer], names: Sequence[str]) -> None:
    """Raise unless the experts' factors can be added: the same modules, ranks and scales.

    Args:
        layers: module path -> its mixing layer.
        names: the experts' names, in order.

    Raises:
        LoraweaveError: two experts differ; the message names them, the module and what differs.
    """
    for path, layer in layers.items():
        layout = layer.bank.layout
        for i, name in enumerate(names):
            mine, first = (layout.ranks[i], layout.scales[i]), (layout.ranks[0], layout.scales[0])
            if mine != first:
                raise LoraweaveError(
                    f"space='factors' adds A and B themselves, so all experts need the same rank and scale in every "
                    f"module: at {path!r} {names[0]!r} has rank {first[0]} and scale {first[1]:g}, {name!r} has rank "
                    f"{mine[0]} and scale {mine[1]:g} (rank 0: does not extend it); use space='delta'"
                )


def added(layer: MixingLayer, weights: Tensor) -> LoraFactors:
    """One module's ``sum_i w_i A_i`` and ``sum_i w_i B_i``, in float64 and rounded once; ``weights``: ``[E]``."""
    bank = layer.bank
    experts, rank = len(bank.layout.ranks), bank.layout.ranks[0]
    w = weights.double().to(bank.device).view(-1, 1, 1)
    A = (w * bank.A.double().view(experts, rank, -1)).sum(0)
    Bt = (w * bank.Bt.double().view(experts, rank, -1)).sum(0)
    return LoraFactors(A.to(bank.A.dtype), Bt.T.to(bank.Bt.dtype), bank.layout.scales[0], bank.embedding)


def factor_sum(layers: Mapping[str, MixingLayer], weights: Tensor, name: str, base: str | None = None) -> Expert:
    """The factors' sum over all modules as one LoRA; :func:`check_alike` must have passed.

    Args:
        layers: module path -> its mixing layer.
        weights: ``[E]``.
        name: the new expert's.
        base: the base model to name.
    """
    if not torch.isfinite(weights).all():
        raise LoraweaveError(f"factor weights: expected finite numbers, got {weights.tolist()}")
    return Expert(name, {path: added(layer, weights) for path, layer in layers.items()}, base=base)
