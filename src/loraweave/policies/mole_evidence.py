"""What a MoLE gate reads, and how Eq. 9 and 10 are computed from it without forming the experts' outputs.

With ``a = A x`` (rank space) an expert's output is ``E_i = s_i B_i a_i``, so all that Eq. 9 and 10 need of it are a
length and inner products, and both live in rank space: ``||E||^2 = sum_i ||s_i G_i^(1/2) a_i||^2`` with
``G_i = B_i^T B_i``, and ``e^T E = sum_i (s_i B_i^T e_i)^T a_i``. The cost per token falls from ``N d r`` to ``N r r``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraweave.experts.bank import Bank
from loraweave.mixing.types import Evidence


class Measured(NamedTuple):
    """An evidence vector ``v`` known by what the normalisation and the projection need of it.

    Attributes:
        coordinates: ``[B, T, C]``, what the gate's matrix multiplies.
        length: ``[B, T, 1]``, ``||v||``.
        total: ``[B, T, 1]``, the sum of ``v``'s entries, where it is asked for.
    """

    coordinates: Tensor
    length: Tensor
    total: Tensor | None


class WideReader(nn.Module):
    """Evidence that is there in full: a hidden state, or the outputs of blocks that ran once per expert."""

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.shape = shape

    def raw(self, evidence: Evidence) -> Tensor:
        return (evidence.hidden if evidence.outputs is None else evidence.outputs.flatten(2)).float()

    def measure(self, v: Tensor, total: bool) -> Measured:
        return Measured(v, length(v), v.sum(-1, keepdim=True) if total else None)

    def matrix(self, e: Tensor) -> Tensor:
        """The gate's parameters ``[L?, *shape, N]`` as the matrix ``[L?, C, N]`` on the coordinates."""
        return e.flatten(-1 - len(self.shape), -2)

    def columns(self, e: Tensor) -> Tensor:
        return e.flatten(0, -2).sum(0)


class RankReader(nn.Module):
    """The experts' outputs, read in rank space.

    Compact coordinates are ``c_i = s_i G_i^(1/2) a_i``: an isometric image of ``E_i``, so that a compact gate learns at
    the same rate as a full one; the symmetric root is unique, so a saved gate means the same everywhere.
    """

    root: Tensor
    ones: Tensor
    B: Tensor
    picked: Tensor

    def __init__(self, bank: Bank, full: bool) -> None:
        super().__init__()
        layout, width = bank.layout, bank.Bt.shape[1]
        self.size = len(layout.ranks) * width
        self.full = full
        self.shape: tuple[int, ...] = (len(layout.ranks), width) if full else (layout.rows,)
        experts = [bank.factors(i) for i in range(len(layout.ranks))]
        present = [f for f in experts if f is not None]
        self.register_buffer("root", torch.block_diag(*(f.scale * symmetric_root(f.B) for f in present)), False)
        self.register_buffer("ones", torch.cat([f.scale * f.B.float().sum(0) for f in present]), False)
        if full:
            padded = torch.zeros(len(experts), max(layout.ranks), width, device=bank.device, dtype=torch.float32)
            for i, f in enumerate(experts):
                if f is not None:
                    padded[i, : f.rank] = f.scale * f.B.T.float()
            rows = [i * max(layout.ranks) + j for i, rank in enumerate(layout.ranks) for j in range(rank)]
            self.register_buffer("B", padded, False)
            self.register_buffer("picked", torch.tensor(rows, device=bank.device), False)

    def raw(self, evidence: Evidence) -> Tensor:
        assert evidence.ranks is not None
        return evidence.ranks.float()

    def measure(self, a: Tensor, total: bool) -> Measured:
        c = a @ self.root
        return Measured(a if self.full else c, length(c), (a @ self.ones).unsqueeze(-1) if total else None)

    def matrix(self, e: Tensor) -> Tensor:
        """The gate's parameters as the matrix ``[L?, R, N]`` on the coordinates: full ones are projected by ``B``."""
        if not self.full:
            return e
        projected: Tensor = (self.B @ e).flatten(-3, -2)[..., self.picked, :]
        return projected

    def columns(self, e: Tensor) -> Tensor | None:
        return e.flatten(0, -2).sum(0) if self.full else None

    def to_compact(self, e: Tensor) -> Tensor:
        """The compact parameters ``[L?, R, N]`` of the function that the full parameters ``e`` describe."""
        inverse: Tensor = torch.linalg.pinv(self.root.double()).to(e.dtype)
        return inverse @ self.matrix(e)


def length(v: Tensor) -> Tensor:
    """``||v||`` over the last axis, which stays, without a full-size intermediate."""
    found: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return found


def symmetric_root(B: Tensor) -> Tensor:
    """``(B^T B)^(1/2)`` of ``[d, r]``: ``[r, r]``, symmetric."""
    values, vectors = torch.linalg.eigh(B.double().T @ B.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root.float()
