"""Concatenation: the weighted sum of all deltas, exactly, as one LoRA whose rank is the sum of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loraweave.transforms.lowrank import stacked
from loraweave.transforms.registry import register
from loraweave.transforms.types import Term


@register
@dataclass(frozen=True)
class Concat:
    """``[B_1 ... B_N] [w_1 s_1 A_1; ...; w_N s_N A_N] = sum_i w_i s_i B_i A_i``; peft calls it ``cat``."""

    name: ClassVar[str] = "concat"
    source: ClassVar[str] = "https://huggingface.co/docs/peft/developer_guides/model_merging"

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        return weighted_sum(terms)


def weighted_sum(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """``A [R, in]`` and ``B [out, R]`` with ``B A = sum_i w_i s_i B_i A_i``."""
    return stacked([term.weight * term.scale * term.A for term in terms], [term.B for term in terms])
