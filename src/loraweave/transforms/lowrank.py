"""Low-rank factors of a matrix: the best there are, without forming the matrix where it comes as factors."""

from __future__ import annotations

import torch
from torch import Tensor


def stacked(terms_A: list[Tensor], terms_B: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Experts' factors side by side: ``A [R, in]`` and ``B [out, R]``, so that ``B A = sum_i B_i A_i``."""
    return torch.cat(terms_A, 0), torch.cat(terms_B, 1)


def supported(singular: Tensor, size: int) -> int:
    """How many singular values are more than rounding errors of a matrix whose longer side is ``size``."""
    if len(singular) == 0:
        return 0
    return int((singular > singular[0] * size * torch.finfo(singular.dtype).eps).sum())


def column_basis(matrix: Tensor) -> Tensor:
    """``[m, n]`` -> ``[m, k]``: its left singular vectors, an orthonormal basis of its column space."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis: Tensor = U[:, : supported(S, max(matrix.shape))]
    return basis


def best_of_product(A: Tensor, B: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation of ``B A`` of at most ``rank`` (Eckart and Young), as balanced factors.

    ``B = Q_B R_B`` and ``A^T = Q_A R_A`` make it the SVD of the small ``R_B R_A^T``, ``[R, R]`` for stacked rank ``R``.

    Args:
        A: ``[R, in]``.
        B: ``[out, R]``.
        rank: ``None`` keeps all that there is.

    Returns:
        ``A' [r, in]`` and ``B' [out, r]``, ``r`` not larger than the rank of ``B A``.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    # What is left of factors that cancel is measured against the factors, not against the rest itself.
    noise = torch.linalg.matrix_norm(R_B) * torch.linalg.matrix_norm(R_A) * max(S.shape) * torch.finfo(S.dtype).eps
    return _balanced(Q_B @ U, S, Vh @ Q_A.T, min(int(S.gt(noise).sum()), _limit(rank, S)))


def best_of_matrix(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`best_of_product`, of a dense ``[out, in]``."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _balanced(U, S, Vh, min(supported(S, max(matrix.shape)), _limit(rank, S)))


def _limit(rank: int | None, singular: Tensor) -> int:
    return len(singular) if rank is None else rank


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # Half of each singular value on either side, so that neither factor strains a half-precision file.
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root
