"""Every merging method against its equation, and what must hold for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import SHAPES, alike, deltas, dense, expert, nearest, paths, slow_elect, slow_ties, slow_trim, total, trio
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
from loraweave.transforms import registry
from loraweave.transforms.elementwise import drop
from loraweave.transforms.types import Term, generator

WEIGHTS = {"ant": 0.7, "bee": -1.2, "cat": 1.0}
EXACT: dict[str, dict[str, Any]] = {
    "concat": {},
    "linear": {},
    "knots": {"then": "linear"},
    "core_space": {"then": "linear"},
    "svd": {"rank": 99},
}
ALL: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in registry.names()},
    "svd-1": ("svd", {"rank": 1}),
    "ties-rank": ("ties", {"density": 0.5, "rank": 2}),
    **{
        f"knots-{then}": ("knots", {"then": then}) for then in ("linear", "magnitude_prune", "dare_linear", "dare_ties")
    },
    **{
        f"core-{then}": ("core_space", {"then": then})
        for then in ("linear", "magnitude_prune", "dare_linear", "dare_ties")
    },
}
FACTORS = {
    name: (name, {"space": "factors"}) for name in ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
}


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def mask(seed: int, name: str, path: str, part: str, shape: Any, density: float) -> Tensor:
    """What DARE keeps, drawn anew."""
    term = Term(name, path, 1.0, torch.zeros(0), torch.zeros(0), 1.0)
    return drop(torch.ones(shape, dtype=torch.float64), density, generator(seed, term, part)) * density


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize(("method", "options"), EXACT.items())
def test_plain_sums_are_exact(method: str, options: dict[str, Any]) -> None:
    experts = trio()
    merged = lw.merge(experts, method, weights=WEIGHTS, **options)
    assert sorted(merged.factors) == paths(experts)
    for path in paths(experts):
        assert_close(dense(merged, path), total(experts, path, WEIGHTS))


def test_ranks_add_up_in_concat() -> None:
    merged = lw.merge(trio(), "concat")
    assert {path: f.rank for path, f in merged.factors.items()} == {"block.q": 6, "block.v": 3, "head": 2}


@pytest.mark.parametrize("rank", [None, 1, 2, 4])
def test_svd_is_the_nearest_of_its_rank(rank: int | None) -> None:
    experts = trio()
    merged = lw.merge(experts, "svd", weights=WEIGHTS, rank=rank)
    for path in paths(experts):
        largest = max(e.factors[path].rank for e in experts.values() if path in e.factors)
        assert merged.factors[path].rank <= (rank or largest)
        assert_close(dense(merged, path), nearest(total(experts, path, WEIGHTS), rank or largest))


def test_linear_in_factors_is_what_lorahub_published() -> None:
    """With equal scales: sum the As, sum the Bs, multiply. Different scales go half to either side."""
    experts = alike(scales=(0.5, 0.5, 0.5))
    merged = lw.merge(experts, "linear", weights=WEIGHTS, space="factors")
    for path in paths(experts):
        A = sum(WEIGHTS[n] * e.factors[path].A for n, e in experts.items())
        B = sum(WEIGHTS[n] * e.factors[path].B for n, e in experts.items())
        assert_close(dense(merged, path), 0.5 * B @ A)
        assert merged.factors[path].rank == 2
    experts = alike()
    merged = lw.merge(experts, "linear", weights=WEIGHTS, space="factors")
    A = sum(WEIGHTS[n] * e.factors["head"].scale ** 0.5 * e.factors["head"].A for n, e in experts.items())
    B = sum(WEIGHTS[n] * e.factors["head"].scale ** 0.5 * e.factors["head"].B for n, e in experts.items())
    assert_close(dense(merged, "head"), B @ A)
    assert not torch.allclose(dense(merged, "head"), total(experts, "head", WEIGHTS)), "cross terms"


def test_negation_turns_one_factor_or_both() -> None:
    one = {"ant": alike()["ant"]}
    before = dense(one["ant"], "head")
    assert_close(dense(lw.merge(one, "linear", weights=-1.0, space="factors", negate="one"), "head"), -before)
    assert_close(dense(lw.merge(one, "linear", weights=-1.0, space="factors", negate="both"), "head"), before)
    assert_close(dense(lw.merge(one, "linear", weights=-1.0), "head"), -before)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruning_of_deltas(method: str, density: float) -> None:
    experts = trio()
    full = lw.merge(experts, method, weights=WEIGHTS, density=density, rank=99)
    short = lw.merge(experts, method, weights=WEIGHTS, density=density)
    for path in paths(experts):
        found = deltas(experts, path)
        weights = [WEIGHTS[name] for name in found]
        if method == "ties":
            expected = slow_ties(list(found.values()), weights, density)
        else:
            expected = sum(w * slow_trim(d, density) for w, d in zip(weights, found.values(), strict=True))
        assert_close(dense(full, path), expected)
        ranks = sum(e.factors[path].rank for e in experts.values() if path in e.factors)
        assert short.factors[path].rank <= ranks
        assert_close(dense(short, path), nearest(expected, ranks))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_of_deltas(method: str) -> None:
    experts = trio()
    merged = lw.merge(experts, method, weights=WEIGHTS, density=0.6, seed=4, rank=99)
    for path in paths(experts):
        kept = [
            WEIGHTS[name] * d * mask(4, name, path, "delta", d.shape, 0.6) / 0.6
            for name, d in deltas(experts, path).items()
        ]
        assert_close(dense(merged, path), slow_elect(kept) if method == "dare_ties" else sum(kept))
    other = lw.merge(experts, method, weights=WEIGHTS, density=0.6, seed=5, rank=99)
    assert not torch.allclose(dense(merged, "block.q"), dense(other, "block.q"))
    assert torch.equal(
        dense(merged, "block.q"),
        dense(lw.merge(experts, method, weights=WEIGHTS, density=0.6, seed=4, rank=99), "block.q"),
    )


def test_random_numbers_differ_between_experts_modules_parts_and_seeds() -> None:
    places = [
        (0, "ant", "q", "A"),
        (1, "ant", "q", "A"),
        (0, "bee", "q", "A"),
        (0, "ant", "v", "A"),
        (0, "ant", "q", "B"),
    ]
    masks = [mask(*place, (40,), 0.5) for place in places]
    for number, one in enumerate(masks):
        assert torch.equal(one, mask(*places[number], (40,), 0.5))
        assert not any(torch.equal(one, other) for other in masks[number + 1 :])


def test_pruning_of_factors() -> None:
    """As peft does it: A and B apart, with the square root of weight and scale on each."""
    experts = alike()
    merged = lw.merge(experts, "ties", weights=WEIGHTS, density=0.5, space="factors")
    for path in paths(experts):
        f = {name: e.factors[path] for name, e in experts.items()}
        root = {name: abs(WEIGHTS[name] * f[name].scale) ** 0.5 for name in f}
        signed = [root[name] * (1 if WEIGHTS[name] > 0 else -1) for name in f]
        A = slow_ties([one.A for one in f.values()], signed, 0.5)
        B = slow_ties([one.B for one in f.values()], list(root.values()), 0.5)
        assert_close(dense(merged, path), B @ A)


@pytest.mark.parametrize("then", ["ties", "magnitude_prune", "dare_ties"])
def test_knots_by_dense_svd(then: str) -> None:
    """The SVD of the deltas side by side, as the paper has it."""
    experts = trio()
    merged = lw.merge(experts, "knots", weights=WEIGHTS, then=then, density=0.4, seed=2)
    for path in paths(experts):
        found = deltas(experts, path)
        U, S, Vh = torch.linalg.svd(torch.cat(list(found.values()), 1), full_matrices=False)
        k = int((S > 1e-9).sum())
        parts = (torch.diag(S[:k]) @ Vh[:k]).split(SHAPES[path][0], 1)
        assert_close(dense(merged, path), U[:, :k] @ small_merge(then, parts, list(found), path, "knots"))
        assert merged.factors[path].rank == k


@pytest.mark.parametrize("then", ["ties", "magnitude_prune", "dare_ties"])
def test_core_space_by_dense_svd(then: str) -> None:
    """Project every delta on the bases of all As and all Bs, merge, and come back."""
    experts = trio()
    merged = lw.merge(experts, "core_space", weights=WEIGHTS, then=then, density=0.4, seed=2)
    for path in paths(experts):
        found = deltas(experts, path)
        factors = [experts[name].factors[path] for name in found]
        U = torch.linalg.svd(torch.cat([f.B for f in factors], 1), full_matrices=False)[0]
        V = torch.linalg.svd(torch.cat([f.A for f in factors], 0), full_matrices=False)[2].T
        cores = [U.T @ delta @ V for delta in found.values()]
        for core, delta in zip(cores, found.values(), strict=True):
            assert_close(U @ core @ V.T, delta)  # nothing is lost on the way
        assert_close(dense(merged, path), U @ small_merge(then, cores, list(found), path, "core_space") @ V.T)


def small_merge(then: str, parts: Any, names: list[str], path: str, owner: str) -> Tensor:
    weights = [WEIGHTS[name] for name in names]
    if then == "ties":
        return slow_ties(parts, weights, 0.4)
    if then == "magnitude_prune":
        result: Tensor = sum(w * slow_trim(p, 0.4) for w, p in zip(weights, parts, strict=True))
        return result
    kept = [mask(2, name, path, owner, part.shape, 0.4) for name, part in zip(names, parts, strict=True)]
    return slow_elect([w * p * m / 0.4 for w, p, m in zip(weights, parts, kept, strict=True)])


# ---------------------------------------------------------------- what must hold for all


@pytest.mark.parametrize(
    ("method", "options"), [*ALL.values(), *FACTORS.values()], ids=[*ALL, *(f"{n}-factors" for n in FACTORS)]
)
def test_invariants(method: str, options: dict[str, Any]) -> None:
    experts = alike() if options.get("space") == "factors" else trio()
    merged = lw.merge(experts, method, weights=WEIGHTS, **options)
    order = ("cat", "ant", "bee")
    permuted = lw.merge({name: experts[name] for name in order}, method, weights=WEIGHTS, **options)
    without = lw.merge({name: experts[name] for name in ("ant", "cat")}, method, weights=1.0, **options)
    zero = lw.merge(experts, method, weights={"bee": 0.0}, **options)
    negated = lw.merge(experts, method, weights={n: -w for n, w in WEIGHTS.items()}, **options)
    both = options.get("space") == "factors" and method == "linear"
    for path in paths(experts):
        assert_close(dense(permuted, path), dense(merged, path), msg="the order of experts matters")
        sign = 1 if both else -1
        assert_close(dense(negated, path), sign * dense(merged, path), msg="turning all does not turn the result")
    assert zero.factors.keys() == without.factors.keys()
    for path in zero.factors:
        assert_close(dense(zero, path), dense(without, path), msg="an expert at weight 0 takes part")


@pytest.mark.parametrize(("method", "options"), ALL.values(), ids=list(ALL))
def test_scales_and_weights_are_one(method: str, options: dict[str, Any]) -> None:
    """Twice the weight is twice the scale; twice all weights is twice the result. In bases made of factors as they
    are (Core Space) and of deltas (KnOTS) the former holds where all scales grow alike."""
    experts = trio()
    doubled = {
        n: dataclasses.replace(e, factors={p: dataclasses.replace(f, scale=2 * f.scale) for p, f in e.factors.items()})
        for n, e in experts.items()
    }
    one = lw.merge(experts, method, **options)
    for other in (lw.merge(doubled, method, **options), lw.merge(experts, method, weights=2.0, **options)):
        for path in paths(experts):
            assert_close(dense(other, path), 2 * dense(one, path))


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, -2.0])), min_size=1, max_size=4),
    st.sampled_from(list(ALL)),
)
def test_any_shapes(size: tuple[int, int], made: list[tuple[int, float]], label: str) -> None:
    method, options = ALL[label]
    random = torch.Generator().manual_seed(size[0] * 100 + size[1] * 10 + len(made))
    experts = {}
    for number, (rank, scale) in enumerate(made):
        A = torch.randn(rank, size[0], generator=random, dtype=torch.float64)
        B = torch.randn(size[1], rank, generator=random, dtype=torch.float64)
        experts[f"e{number}"] = lw.Expert(f"e{number}", {"m": lw.LoraFactors(A, B, scale)})
    options = {**options, "density": 1.0} if "dare" in label else options  # else DARE may drop all of a tiny matrix
    merged = lw.merge(experts, method, **options)
    f = merged.factors["m"]
    assert (f.A.shape[1], f.B.shape[0]) == size
    assert 1 <= f.rank <= sum(rank for rank, _ in made)
    assert torch.isfinite(dense(f)).all()
    if method in EXACT and options == EXACT[method]:
        assert_close(dense(f), sum((dense(e, "m") for e in experts.values()), torch.zeros(size[1], size[0]).double()))


def test_the_widest_dtype_is_kept_and_rounding_is_done_once() -> None:
    experts = {
        "a": expert("a", {"head": 2}, 0.3, seed=1, dtype=torch.bfloat16),
        "b": expert("b", {"head": 2, "block.q": 1}, 0.3, seed=2, dtype=torch.bfloat16),
    }
    merged = lw.merge(experts, "concat")
    assert {t.dtype for f in merged.factors.values() for t in (f.A, f.B)} == {torch.bfloat16}
    f = merged.factors["head"]
    assert torch.equal(f.A[:2], (0.3 * experts["a"].factors["head"].A.double()).bfloat16())
    assert torch.equal(f.B[:, :2], experts["a"].factors["head"].B)
    experts["c"] = expert("c", {"head": 1}, seed=3, dtype=torch.float32)
    mixed = lw.merge(experts, "svd")
    assert mixed.factors["head"].A.dtype == torch.float32
    assert mixed.factors["block.q"].A.dtype == torch.bfloat16


def test_what_cancels_is_left_out() -> None:
    one = alike()["ant"]
    experts = {"a": one, "b": expert("b", {"block.v": 1})}
    copy = dataclasses.replace(one)
    merged = lw.merge({**experts, "c": copy}, "svd", weights={"c": -1.0})
    assert list(merged.factors) == ["block.v"]
    with pytest.raises(lw.LoraweaveError, match="cancel each other"):
        lw.merge({"a": one, "c": copy}, "ties", weights={"c": -1.0})


def test_untrained_experts_do_no_harm() -> None:
    """A LoRA whose B is still zero adds nothing."""
    fresh = lw.Expert("fresh", {"head": lw.LoraFactors(torch.randn(2, 4).double(), torch.zeros(9, 2).double(), 1.0)})
    other = expert("other", {"head": 2})
    for method, options in ALL.values():
        merged = lw.merge({"fresh": fresh, "other": other}, method, **options)
        assert torch.isfinite(dense(merged, "head")).all()
    assert_close(dense(lw.merge({"fresh": fresh, "other": other}, "ties", density=1.0), "head"), dense(other, "head"))


def test_the_result_never_holds_a_dense_matrix_where_it_need_not() -> None:
    """An in x out of 400,000 x 400,000 would not fit in memory; these methods never form it."""
    wide = 400_000
    experts = {
        name: lw.Expert(name, {"m": lw.LoraFactors(torch.randn(1, wide), torch.randn(wide, 1), 1.0)}) for name in "ab"
    }
    for method in ("concat", "linear", "svd", "knots", "core_space"):
        assert lw.merge(experts, method).factors["m"].rank <= 2
