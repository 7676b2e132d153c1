"""Pure functions of the mixing mathematics; nothing here knows a model.

Axes: B rows, T tokens, E experts, R rank rows of all experts together, d width of an expert's output, N = E.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Normalization = Literal["l2", "rms", "layer"]

# Far below any evidence worth reading: an expert's output may itself be tiny, and a gate must still see its direction.
EPSILON = 1e-12


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
    return F.linear(x, A)


def expand(a: Tensor, w: Tensor | None, Bt: Tensor, y: Tensor) -> Tensor:
    """``y + (a * w) B^T``; see :func:`low_rank`."""
    if w is not None:
        a = a * w.to(a.dtype)
    rows = a.reshape(-1, a.shape[-1])
    if y.dtype == a.dtype == Bt.dtype and y.is_contiguous():
        if torch.is_grad_enabled():
            return torch.addmm(y.view(-1, y.shape[-1]), rows, Bt).view(y.shape)
        y.view(-1, y.shape[-1]).addmm_(rows, Bt)
        return y
    return y + (rows @ Bt).view(y.shape).to(y.dtype)


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
    if normalization == "l2":
        return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + EPSILON)
    if normalization == "layer":
        v = v - v.mean(-1, keepdim=True)
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPSILON)


def normalized_logits(
    projected: Tensor,
    square: Tensor,
    size: int,
    normalization: Normalization,
    total: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """``normalize(v) . e`` from sums over ``v`` alone, without forming ``v`` (Eq. 9 and 10 together).

    Args:
        projected: ``[..., N]``, ``e^T v``.
        square: ``[...]``, squared length of ``v``.
        size: number of entries of ``v``.
        normalization: which normalisation.
        total: ``[...]``, the sum of ``v``'s entries; read by ``layer`` alone.
        columns: ``[N]``, the column sums of ``e``; read by ``layer`` alone.
    """
    if normalization == "l2":
        return projected * torch.rsqrt(square + EPSILON).unsqueeze(-1)
    if normalization == "rms":
        return projected * torch.rsqrt(square / size + EPSILON).unsqueeze(-1)
    assert columns is not None
    assert total is not None
    mean = total / size
    variance = (square / size - mean.square()).clamp(min=0)
    return (projected - mean.unsqueeze(-1) * columns) * torch.rsqrt(variance + EPSILON).unsqueeze(-1)


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
