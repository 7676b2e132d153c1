"""Pure functions of the mixing mathematics; nothing here knows a model.

Axes: B rows, T tokens, E experts, R rank rows of all experts together, d width of an expert's output, N = E.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Normalization = Literal["l2", "rms", "layer"]

# Far below any evidence worth reading: an expert's output may itself be tiny, and a gate must still see its direction.
EPSILON = 1e-12

# Up to so many rows a product is shared out among processors (:func:`_parts`), one for so many rank rows.
_FEW_ROWS = 64
_RANK_ROWS_EACH = 16


def low_rank(x: Tensor, A: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
    """``y + ((x A^T) * w) B^T``: the whole mixture at one module, in two matrix products.

    Without gradients the sum is accumulated into ``y`` itself, so no second full-size output is made.

    Args:
        x: ``[..., in]``.
        A: ``[R, in]``.
        w: rank-row weights that broadcast against ``[..., R]``; ``None`` for ones.
        Bt: ``[R, out]``.
        y: ``[..., out]``, the base module's output.
    """
    return expand(shrink(x, A), w, Bt, y)


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """``x A^T``: into rank space, ``[..., R]``."""
    if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    R, width = A.shape
    if x.is_cpu and x.numel() <= _FEW_ROWS * width and (parts := _parts(A, R)) > 1:
        # A.view(parts, -1, width).mT, made in one step: of a single row that counts
        columns = A.as_strided((parts, width, R // parts), (R // parts * width, 1, width))
        if x.numel() == width and x.ndim <= 3:
            return torch.bmm(x.expand(parts, 1, width), columns).view(*x.shape[:-1], R)
        a = torch.bmm(x.reshape(1, -1, width).expand(parts, -1, -1), columns)
        return a.transpose(0, 1).reshape(*x.shape[:-1], R)
    return F.linear(x, A)


def expand(a: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
    """``y + (a * w) B^T``; see :func:`low_rank`."""
    if w is not None:
        a = a * (w if w.dtype == a.dtype else w.to(a.dtype))
    if y.dtype == a.dtype == Bt.dtype and y.is_contiguous():
        R, width = Bt.shape
        if a.is_cpu and a.numel() == R and a.ndim <= 3 and (parts := _parts(Bt, width)) > 1:
            each = width // parts
            columns = Bt.as_strided((parts, R, each), (each, width, 1))
            y.view(parts, 1, each).baddbmm_(a.expand(parts, 1, R), columns)
            return y
        rows = a.reshape(-1, R)
        if torch.is_grad_enabled():
            return torch.addmm(y.view(-1, y.shape[-1]), rows, Bt).view(y.shape)
        y.view(-1, y.shape[-1]).addmm_(rows, Bt)
        return y
    return y + (a.reshape(-1, a.shape[-1]) @ Bt).view(y.shape).to(y.dtype)


def _parts(factor: Tensor, shared: int) -> int:
    """Among how many processors to share out a product with few rows, by its ``shared`` outputs.

    Most BLAS leave it to one, which reads the factor at a fraction of what memory gives (here 12 of 35 GB/s); of a
    batched product every processor takes a part.
    """
    if (
        torch.is_grad_enabled()
        or factor.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not factor.is_contiguous()
    ):
        return 1
    return _even_parts(factor.shape[0], shared, torch.get_num_threads())


@lru_cache(maxsize=1024)
def _even_parts(rank_rows: int, shared: int, processors: int) -> int:
    most = min(processors, rank_rows // _RANK_ROWS_EACH)
    return next((parts for parts in range(most, 1, -1) if shared % parts == 0), 1)


def shrink_conv(x: Tensor, A: Tensor, **geometry: Any) -> Tensor:
    """:func:`shrink` of a convolution: ``[B, in, h, w]``, ``A`` ``[R, in, kh, kw]`` -> ``[B, R, h', w']``.

    Args:
        x: the picture.
        A: the kernels, of the base's own size.
        geometry: ``stride``, ``padding`` and ``dilation`` of the base.
    """
    if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    return F.conv2d(x, A, **geometry)


def expand_conv(a: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
    """:func:`expand` of a convolution: a 1 x 1 convolution with ``B``.

    Args:
        a: ``[B, R, h, w]``.
        w: rank-row weights: ``[R]``, or whatever broadcasts against ``a``; ``None`` for ones.
        Bt: ``[R, out]``.
        y: ``[B, out, h, w]``, the base module's output.
    """
    if w is not None:
        a = a * (w.view(-1, 1, 1) if w.ndim == 1 else w).to(a.dtype)
    added = F.conv2d(a, Bt.T[:, :, None, None]).to(y.dtype)
    return y + added if torch.is_grad_enabled() else y.add_(added)


def low_rank_rows(x: Tensor, A: Tensor, w: Tensor, Bt: Tensor, y: Tensor) -> Tensor:
    """:func:`low_rank` where each row of the batch has its own few experts.

    Args:
        x: ``[B, T, in]``.
        A: ``[B, S, in]``, the rank rows each batch row uses.
        w: ``[B, T or 1, S]``.
        Bt: ``[B, S, out]``.
        y: ``[B, T, out]``.
    """
    a = torch.bmm(x.to(A.dtype), A.mT) * w
    if y.dtype == a.dtype:
        return torch.baddbmm(y, a, Bt) if torch.is_grad_enabled() else y.baddbmm_(a, Bt)
    return y + torch.bmm(a, Bt).to(y.dtype)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens a mask keeps: ``[B, T, C]``, ``[B, T]`` -> ``[B, 1, C]``."""
    if mask is None:
        return x.mean(1, keepdim=True)
    kept = mask.to(x).unsqueeze(-1)
    return (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def gram(B: Tensor) -> Tensor:
    """Block-diagonal ``B_i^T B_i``: ``[E, r, d]`` (padded with zeros) -> ``[E, r, r]``."""
    return B @ B.mT


def normalize(v: Tensor, normalization: Normalization) -> Tensor:
    """Normalise the last axis (MoLE Eq. 9, which leaves the kind open)."""
    if normalization == "layer":
        v = v - v.mean(-1, keepdim=True)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    least, normal = _lengths(v.shape[-1], normalization)
    normalized: Tensor = v / length.clamp(min=least) * normal
    return normalized


def _lengths(size: int, normalization: Normalization) -> tuple[float, float]:
    """The least length that is told from zero, and that of a normalised vector of this many entries."""
    return (EPSILON**0.5, 1.0) if normalization == "l2" else ((EPSILON * size) ** 0.5, size**0.5)


def normalized_logits(
    projected: Tensor,
    length: Tensor,
    size: int,
    normalization: Normalization,
    *,
    total: Tensor | None = None,
    columns: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """``normalize(v) . e + offset`` from sums over ``v``, without forming ``normalize(v)`` (Eq. 9 and 10 together).

    Args:
        projected: ``[..., N]``, ``e^T v``.
        length: ``[..., 1]``, that of ``v``.
        size: number of entries of ``v``.
        normalization: which normalisation.
        total: ``[..., 1]``, the sum of ``v``'s entries; read by ``layer`` alone.
        columns: ``[N]``, the column sums of ``e``; read by ``layer`` alone.
        offset: ``[N]``; none: zero.
    """
    least, normal = _lengths(size, normalization)
    if normalization == "layer":
        assert columns is not None
        assert total is not None
        mean = total / size
        projected = projected - mean * columns
        length = (length.square() - total * mean).clamp(min=least**2).sqrt()
    unit = length.clamp(min=least)
    if offset is None:
        return projected / unit * normal
    return torch.addcdiv(offset, projected, unit, value=normal)


def masked_total(scale: Tensor | float, kept: int, experts: int) -> Tensor | float:
    """What the weights sum to when ``kept`` of ``experts`` remain: an expert left alone always has weight 1."""
    if kept == experts:
        return scale
    return 1.0 + (scale - 1.0) * (kept - 1) / (experts - 1)


def renormalize(g: Tensor, kept: Tensor) -> Tensor:
    """``g * m / sum(g * m)``: mask experts and share out what they had (MoLE's second inference mode)."""
    masked = g * kept
    return masked / masked.sum(-1, keepdim=True)


def balance_loss(shares: Tensor) -> Tensor:
    """``-log prod_i q_i`` (MoLE Eq. 14): smallest, at ``N log N``, when every expert gets the same share.

    Args:
        shares: ``[N]``, the mean weight of each expert over all sites (Eq. 15), summing to one.
    """
    return -shares.clamp(min=1e-20).log().sum()
