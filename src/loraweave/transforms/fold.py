"""Folding: a mixture whose weights depend on nothing becomes plain weights, or one ordinary LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert, LoraFactors
from loraweave.mixing.layer import MixingLayer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Folded:
    """Weights that hold a mixture, and the originals to put back."""

    layers: Mapping[str, MixingLayer]
    originals: dict[str, nn.Parameter]

    def restore(self) -> None:
        """Put the originals back.

        Raises:
            LoraweaveError: the folded weights were offloaded meanwhile, which would bring them back at each call.
        """
        for path, weight in self.originals.items():
            if self.layers[path].base.weight.is_meta and not weight.is_meta:
                raise LoraweaveError(
                    f"cannot unfold {path!r}: its weight was offloaded after folding; take the offloading back first, "
                    "e.g. pipe.remove_all_hooks()"
                )
        for path, weight in self.originals.items():
            self.layers[path].base.weight = weight


def fold(layers: Mapping[str, MixingLayer], weights: Mapping[str, Tensor]) -> Folded:
    """Add ``sum_i g_i s_i B_i A_i`` to each base weight (computed in float64, rounded once).

    The original parameters are kept aside untouched, so folding back is exact; while folded, the extended modules'
    weights are in memory twice.

    Args:
        layers: module path -> its mixing layer.
        weights: module path -> ``[E]``.

    Raises:
        LoraweaveError: a base module's weight is quantised or missing; nothing has been folded then.
    """
    for path, layer in layers.items():
        weight = getattr(layer.base, "weight", None)
        if (
            not isinstance(weight, nn.Parameter)
            or type(weight.data) is not Tensor  # quantised tensors of torchao say that they are float
            or weight.dtype not in FLOATS
            or weight.ndim not in (2, 4)
            or weight.is_meta
        ):
            raise LoraweaveError(
                f"cannot fold into {path!r}: its weight is not a plain float matrix (quantised or offloaded?)"
            )
    originals: dict[str, nn.Parameter] = {path: layer.base.weight for path, layer in layers.items()}  # type: ignore[misc]
    folded = Folded(layers, originals)
    for path, layer in layers.items():
        weight = folded.originals[path]
        delta = layer.bank.delta(weights[path])
        # Embeddings and GPT-2's Conv1D keep their weight as [in, out].
        upright = delta.T if layer.bank.embedding or type(layer.base).__name__ == "Conv1D" else delta
        merged = (weight.double() + upright.to(weight.device)).to(weight.dtype)
        layer.base.weight = nn.Parameter(merged, requires_grad=False)
        layer.fix(torch.zeros(len(layer.bank.layout.ranks), dtype=torch.float64))
    return folded


def one_expert(layers: Mapping[str, MixingLayer], weights: Mapping[str, Tensor], name: str, base: str | None) -> Expert:
    """The mixture as one LoRA: factors concatenated, ``g_i s_i`` multiplied into ``A_i``; experts at 0 left out.

    Raises:
        LoraweaveError: every weight is zero, so there is nothing to write.
    """
    factors = {}
    for path, layer in layers.items():
        bank = layer.bank
        rows = bank.layout.row_weights(weights[path]).to(bank.device)
        used = rows.nonzero().squeeze(1)
        if len(used):
            scales = rows[used].view(-1, *[1] * (bank.A.ndim - 1))
            A = (scales * bank.A[used].double()).to(bank.A.dtype)
            factors[path] = LoraFactors(A, bank.Bt[used].T.contiguous(), 1.0, bank.embedding)
    if not factors:
        raise LoraweaveError("every expert has weight 0, so there is no LoRA to write")
    return Expert(name, factors, base=base)
