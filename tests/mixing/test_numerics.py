"""The pure functions, against what their docstrings say, for any shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from loraweave.mixing import numerics

sizes = st.integers(1, 4)
few = settings(max_examples=25)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@few
@given(st.lists(sizes, min_size=0, max_size=3), sizes, sizes, sizes, st.booleans(), st.booleans())
def test_low_rank(front: list[int], wide: int, rank: int, out: int, weighted: bool, grad: bool) -> None:
    x, A, Bt = normal(*front, wide), normal(rank, wide, seed=1), normal(rank, out, seed=2)
    w = normal(*front, rank, seed=3) if weighted else None
    y = normal(*front, out, seed=4)
    expected = y.clone()
    for r in range(rank):
        a = (x * A[r]).sum(-1) * (1.0 if w is None else w[..., r])
        expected = expected + a.unsqueeze(-1) * Bt[r]
    kept = y.clone()
    with torch.set_grad_enabled(grad):
        assert_close(numerics.low_rank(x, A, w, Bt, y), expected)
    if grad:
        assert torch.equal(y, kept), "a tensor that autograd may need was overwritten"


@few
@given(sizes, sizes, sizes, sizes, sizes, st.booleans())
def test_low_rank_rows(rows: int, tokens: int, wide: int, used: int, out: int, grad: bool) -> None:
    x, A, Bt = normal(rows, tokens, wide), normal(rows, used, wide, seed=1), normal(rows, used, out, seed=2)
    w, y = normal(rows, 1, used, seed=3), normal(rows, tokens, out, seed=4)
    expected = torch.stack([y[b] + (x[b] @ A[b].T * w[b]) @ Bt[b] for b in range(rows)])
    with torch.set_grad_enabled(grad):
        assert_close(numerics.low_rank_rows(x, A, w, Bt, y), expected)


@pytest.fixture
def four_processors() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_processors")
@pytest.mark.parametrize("rank", [64, 48, 80, 33, 8])
@pytest.mark.parametrize("front", [(), (1,), (1, 1), (2, 1), (1, 3), (3, 21), (2, 40), (0, 1)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("out", [12, 7])
def test_products_with_few_rows_shared_out_among_processors(
    rank: int, front: tuple[int, ...], weighted: bool, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, A, Bt, w, y = (
        tensor.float()
        for tensor in (
            normal(*front, 12),
            normal(rank, 12, seed=1),
            normal(rank, out, seed=2),
            normal(*front, rank, seed=3),
            normal(*front, out, seed=4),
        )
    )
    batched: list[int] = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: batched.append(len(a)) or real(a, b))
    add = torch.Tensor.baddbmm_
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda y, a, b: batched.append(len(a)) or add(y, a, b))
    a = x @ A.T
    expected = y + (a * w if weighted else a) @ Bt
    apart = numerics.low_rank(x.mT.contiguous().mT if x.ndim > 1 else x, A, w if weighted else None, Bt, y.clone())
    assert not batched, "products that autograd follows are left whole"
    with torch.no_grad():
        got = numerics.low_rank(x, A, w if weighted else None, Bt, y)
    assert got is y or got.data_ptr() == y.data_ptr()
    assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert_close(apart, expected, atol=1e-4, rtol=1e-4)
    into = {64: 4, 48: 3, 80: 4, 33: 1, 8: 1}[rank]
    back = {64: 4, 48: 3, 80: 4, 33: 2, 8: 1}[rank] if out == 12 else 1
    rows = x.numel() // 12
    shared = [into] * (rows <= 64) + [back] * (rows == 1)
    assert batched == [parts for parts in shared if parts > 1]


def test_a_y_that_is_not_contiguous() -> None:
    x, A, Bt = normal(2, 3, 4), normal(2, 4), normal(2, 5)
    y = normal(3, 2, 5).transpose(0, 1)
    expected = y + x @ A.T @ Bt
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(numerics.low_rank(x, A, None, Bt, y.clone(memory_format=torch.preserve_format)), expected)


@few
@given(sizes, sizes, sizes, st.data())
def test_masked_mean(rows: int, tokens: int, wide: int, data: Any) -> None:
    x = normal(rows, tokens, wide)
    assert_close(numerics.masked_mean(x, None), x.mean(1, keepdim=True))
    bits = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
    mask = torch.tensor(data.draw(bits)).view(rows, tokens)
    got = numerics.masked_mean(x, mask)
    for b in range(rows):
        kept = x[b][mask[b]]
        assert_close(got[b, 0], kept.mean(0) if len(kept) else torch.zeros(wide, dtype=torch.float64))


@few
@given(sizes, st.integers(2, 6), sizes, st.sampled_from(["l2", "rms", "layer"]))
def test_logits_without_the_normalised_vector(rows: int, wide: int, experts: int, normalization: Any) -> None:
    v, e = normal(rows, wide) + 0.3, normal(wide, experts, seed=1)
    length, total, offset = v.norm(dim=-1, keepdim=True), v.sum(-1, keepdim=True), normal(experts, seed=2)
    sums: Any = {"total": total, "columns": e.sum(0)}
    got = numerics.normalized_logits(v @ e, length, wide, normalization, **sums)
    assert_close(got, numerics.normalize(v, normalization) @ e, atol=1e-9, rtol=1e-9)
    moved = numerics.normalized_logits(v @ e, length, wide, normalization, **sums, offset=offset)
    assert_close(moved, got + offset)


def test_normalisations_are_those_of_torch() -> None:
    v = normal(3, 7)
    assert_close(numerics.normalize(v, "l2"), torch.nn.functional.normalize(v, dim=-1))
    assert_close(numerics.normalize(v, "rms"), torch.nn.functional.rms_norm(v, (7,), eps=1e-12))
    assert_close(numerics.normalize(v, "layer"), torch.nn.functional.layer_norm(v, (7,), eps=1e-12))


@pytest.mark.parametrize("normalization", ["l2", "rms", "layer"])
def test_no_evidence_gives_no_logits_and_a_finite_gradient(normalization: Any) -> None:
    v = torch.zeros(1, 4, requires_grad=True)
    e = torch.ones(4, 2, requires_grad=True)
    length, total = torch.linalg.vector_norm(v, dim=-1, keepdim=True), v.sum(-1, keepdim=True)
    out = numerics.normalized_logits(v @ e, length, 4, normalization, total=total, columns=e.sum(0))
    assert torch.equal(out, torch.zeros(1, 2))
    out.sum().backward()
    assert torch.isfinite(v.grad).all()
    assert torch.isfinite(e.grad).all()


@given(st.floats(0.1, 20), st.integers(2, 20), st.data())
def test_masked_total(scale: float, experts: int, data: Any) -> None:
    kept = data.draw(st.integers(1, experts))
    got = numerics.masked_total(scale, kept, experts)
    assert_close(got, 1 + (scale - 1) * (kept - 1) / (experts - 1))
    assert numerics.masked_total(scale, 1, experts) == 1.0
    assert numerics.masked_total(scale, experts, experts) == scale


def test_masked_total_of_a_mixture_of_one() -> None:
    assert numerics.masked_total(3.0, 1, 1) == 3.0


@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=6), st.data())
def test_renormalize(weights: list[float], data: Any) -> None:
    g = torch.tensor(weights, dtype=torch.float64)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(g), max_size=len(g)).filter(any)))
    got = numerics.renormalize(g, kept)
    assert_close(got.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (got[~kept] == 0).all()
    assert_close(got[kept] / got[kept][0], g[kept] / g[kept][0])
