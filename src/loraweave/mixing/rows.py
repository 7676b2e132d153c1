"""One batch, many mixtures: every row has fixed weights of its own, as in servers of many LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.experts.paging import PagedBank
from loraweave.mixing import numerics

if TYPE_CHECKING:
    from loraweave.experts.bank import Bank
    from loraweave.mixing.layer import MixingLayer

# How many multiplications a processor does while it reads one number that no other row of the batch needs.
_READING = 12


class RowsTerm:
    """The low-rank term of one layer where each row of the batch has its own ``g``.

    Only the rank rows that some row needs are computed. Where rows need different ones, each gets its own copy of those
    it needs, so that a row costs what it would cost alone; but with few tokens a row, as in decoding, reading many
    copies takes longer than one product with all of them.

    Args:
        bank: the layer's experts.
        weights: ``[rows, E]``. A batch of ``n`` times as many rows gives each mixture ``n`` rows that follow each
            other, as ``generate`` repeats rows for beams and for several answers.
        matrix: whether the layer is a matrix product, rather than a look-up or a convolution.
    """

    def __init__(self, bank: Bank, weights: Tensor, matrix: bool) -> None:
        self.weights = weights
        self.matrix = matrix
        w = torch.stack([bank.layout.row_weights(row) for row in weights])  # [rows, R]
        each = [row.nonzero().flatten() for row in w]
        shared = w.any(0).nonzero().flatten()
        most = max(len(needed) for needed in each)
        self.idle = most == 0
        apart = matrix and most < len(shared) and not isinstance(bank, PagedBank)
        self.most_dense = _READING * most // (len(shared) - most) if apart else None
        self.own: tuple[Tensor, Tensor, Tensor] | None = None
        with torch.inference_mode(False):
            self.w = w[:, shared].to(bank.device, bank.dtype)
            self.factors = _fetching(bank, shared) if isinstance(bank, PagedBank) else _standing(bank, shared)
            if self.most_dense is not None:
                picked = torch.stack([torch.cat([n, n.new_zeros(most - len(n))]) for n in each])
                spare = torch.arange(most) >= torch.tensor([[len(needed)] for needed in each])
                weights_of_own = w.gather(1, picked).masked_fill(spare, 0.0).unsqueeze(1).to(self.w)
                picked = picked.to(bank.device)
                self.own = bank.A[picked], weights_of_own, bank.Bt[picked]

    def add(self, layer: MixingLayer, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus the low-rank term of the layer's input ``x``.

        Raises:
            LoraweaveError: the batch has not a multiple of as many rows as there are mixtures.
        """
        rows = len(self.weights)
        if x.shape[0] % rows:
            raise LoraweaveError(
                f"{layer.path}: rows(...) was given {rows} mixtures, but a batch of {x.shape[0]} rows came; give one "
                "mixture a row (beams and several answers a row are counted by themselves)"
            )
        if self.idle:
            return y
        if not self.matrix:
            A, Bt = self.factors()
            a = layer.shrink(x, A)
            w = self.w.repeat_interleave(x.shape[0] // rows, 0)
            return layer.expand(a, w[:, :, None, None] if a.ndim == 4 else w.unsqueeze(1), Bt, y)
        split = x.reshape(rows, -1, x.shape[-1])
        if self.own is None or self.most_dense is None or split.shape[1] <= self.most_dense:
            A, Bt = self.factors()
            a = numerics.shrink(split, A)
            return numerics.expand(a * self.w.unsqueeze(1).to(a.dtype), None, Bt, y)
        out = y.reshape(rows, -1, y.shape[-1])
        return numerics.low_rank_rows(split, *self.own, out).view(y.shape)


def _standing(bank: Bank, rows: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """``A`` and ``Bt`` of these rank rows, copied now if they are not all there are."""
    if len(rows) == bank.layout.rows:
        factors = bank.A, bank.Bt
    else:
        here = rows.to(bank.device)
        factors = bank.A[here], bank.Bt[here]
    return lambda: factors


def _fetching(bank: PagedBank, rows: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same, fetched at each call."""
    owners = torch.arange(len(bank.layout.ranks)).repeat_interleave(torch.tensor(bank.layout.ranks))
    experts = owners[rows].unique().tolist()
    return lambda: bank.fetch(experts)
