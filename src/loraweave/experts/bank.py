"""The bank: all experts of one module stacked, so that N experts cost two matrix products and not 2N."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraweave.experts.types import LoraFactors


class Layout:
    """Which rank rows of a bank belong to which expert.

    Attributes:
        ranks: rank of each expert, 0 where an expert does not touch the module.
        scales: scale ``s_i`` of each expert.
        offsets: first row of each expert, with the total number of rows ``R`` appended.
    """

    def __init__(self, ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
        self.ranks = ranks
        self.scales = scales
        offsets = [0]
        for rank in ranks:
            offsets.append(offsets[-1] + rank)
        self.offsets = tuple(offsets)
        self.rows = offsets[-1]
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def spread(self, like: Tensor) -> Tensor:
        """``[E, R]``: multiplies mixing weights ``[..., E]`` into rank-row weights ``[..., R]``, scales included."""
        return self._tensors(like)[0]

    def row_weights(self, weights: Tensor) -> Tensor:
        """``[E]`` -> ``[R]``: weights of the rank rows, scales included, in float64 on the CPU."""
        scaled = weights.double().cpu() * torch.tensor(self.scales, dtype=torch.float64)
        return scaled.repeat_interleave(torch.tensor(self.ranks))

    def padded_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``[E, r_max]`` row numbers of each expert and their scales; padding points at row 0 with scale 0."""
        return self._tensors(like)[1:]

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make now what mixing these rows needs: made by a compiled model's first call, the second compiles again."""
        for each in {dtype, torch.promote_types(dtype, torch.float32)}:
            self._tensors(torch.empty(0, dtype=each, device=device))

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (like.device, like.dtype)
        if key not in self._on_device:
            # What is first needed under inference_mode must serve training later.
            with torch.inference_mode(False):
                self._on_device[key] = self._made(like)
        return self._on_device[key]

    def _made(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        widest = max(self.ranks)
        spread = torch.zeros(len(self.ranks), self.rows, dtype=torch.float64)
        index = torch.zeros(len(self.ranks), widest, dtype=torch.long)
        scale = torch.zeros(len(self.ranks), widest, dtype=torch.float64)
        for i, (rank, s, start) in enumerate(zip(self.ranks, self.scales, self.offsets, strict=False)):
            spread[i, start : start + rank] = s
            index[i, :rank] = torch.arange(start, start + rank)
            scale[i, :rank] = s
        device, dtype = like.device, like.dtype
        return spread.to(device, dtype), index.to(device), scale.to(device, dtype)


@lru_cache(maxsize=4096)
def layout(ranks: tuple[int, ...], scales: tuple[float, ...]) -> Layout:
    """One shared :class:`Layout` per arrangement, so that modules can recognise that theirs is the same."""
    return Layout(ranks, scales)


class Extent(NamedTuple):
    """How much room one LoRA takes: all of :class:`LoraFactors` but the numbers.

    Attributes:
        rank, scale, embedding: its own.
        inputs: shape of one row of ``A``.
        outputs: rows of ``B``.
    """

    rank: int
    scale: float
    inputs: tuple[int, ...]
    outputs: int
    embedding: bool

    @classmethod
    def of(cls, f: LoraFactors) -> Extent:
        return cls(f.rank, float(f.scale), tuple(f.A.shape[1:]), f.B.shape[0], f.embedding)


def arrange(extents: Sequence[Extent | None]) -> tuple[Layout, Extent]:
    """How these LoRAs of one module lie below one another, and one of them, whose widths are everybody's."""
    ranks = tuple(0 if extent is None else extent.rank for extent in extents)
    scales = tuple(0.0 if extent is None else extent.scale for extent in extents)
    return layout(ranks, scales), next(extent for extent in extents if extent is not None)


class Bank(nn.Module):
    """The experts of one module, stacked in the mixture's order.

    Attributes:
        A: ``[R, in]``, every expert's ``A_i`` below one another (``R`` = sum of ranks); of a convolution
            ``[R, in, kh, kw]``.
        Bt: ``[R, out]``, every expert's ``B_i`` transposed, so that one expert is a contiguous slice of rows.
        layout: which rows belong to which expert, and the scales.
        embedding: whether ``A`` is looked up by token number rather than multiplied.
    """

    A: Tensor
    Bt: Tensor

    def __init__(self, A: Tensor, Bt: Tensor, rows: Layout, embedding: bool = False) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("Bt", Bt, persistent=False)
        self.layout = rows
        self.embedding = embedding

    @classmethod
    def stack(cls, factors: Sequence[LoraFactors | None], dtype: torch.dtype, device: torch.device) -> Bank:
        """Stack one module's factors, one entry per expert of the mixture (``None``: does not touch this module)."""
        bank = cls.room_for([None if f is None else Extent.of(f) for f in factors], dtype, device)
        for number, f in enumerate(factors):
            if f is not None:
                bank.put(number, f)
        return bank

    @classmethod
    def room_for(cls, extents: Sequence[Extent | None], dtype: torch.dtype, device: torch.device) -> Bank:
        """A bank of the size that these LoRAs need, whose rows :meth:`put` has yet to write."""
        rows, first = arrange(extents)
        A = torch.empty(rows.rows, *first.inputs, dtype=dtype, device=device)
        Bt = torch.empty(rows.rows, first.outputs, dtype=dtype, device=device)
        return cls(A, Bt, rows, first.embedding)

    @property
    def device(self) -> torch.device:
        """Where the factors are multiplied."""
        return self.A.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the factors are multiplied."""
        return self.A.dtype

    def put(self, expert: int, f: LoraFactors) -> None:
        """Write the rows of expert number ``expert``."""
        start = self.layout.offsets[expert]
        self.A[start : start + f.rank].copy_(f.A)
        self.Bt[start : start + f.rank].copy_(f.B.T)

    def factors(self, expert: int) -> LoraFactors | None:
        """Expert number ``expert`` as it was stacked (views, no copy), or ``None`` if it does not touch this module."""
        start, rank = self.layout.offsets[expert], self.layout.ranks[expert]
        if rank == 0:
            return None
        rows = slice(start, start + rank)
        return LoraFactors(self.A[rows], self.Bt[rows].T, self.layout.scales[expert], self.embedding)

    def delta(self, weights: Tensor) -> Tensor:
        """``[out, in]``: the dense update ``sum_i g_i s_i B_i A_i`` for constant mixing weights ``[E]``.

        Of a convolution ``[out, in, kh, kw]``.
        """
        A = self.A
        rows = self.layout.row_weights(weights).to(A.device).unsqueeze(1)
        delta = self.Bt.double().T @ (rows * A.double().flatten(1))
        return delta.view(-1, *A.shape[1:])
