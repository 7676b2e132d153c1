"""Banks and constant mixtures of any ranks, scales and weights, against loops, on a plain torch model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import loraweave as lw
from loraweave.experts.bank import Bank, layout

finite = st.floats(-3, 3, allow_nan=False).map(lambda v: round(v, 3))


@st.composite
def cases(draw: Any) -> tuple[dict[str, lw.Expert], list[float]]:
    """Experts that touch at least one module each, and a weight for each."""
    count = draw(st.integers(1, 4))
    rank = st.integers(0, 3)
    ranks = {name: draw(st.lists(rank, min_size=count, max_size=count)) for name in toy.WIDTHS}
    for i in range(count):
        if not any(here[i] for here in ranks.values()):
            ranks["up"][i] = 1
    scales = draw(st.lists(finite, min_size=count, max_size=count))
    weights = draw(st.lists(st.one_of(finite, st.just(0.0), st.just(1.0)), min_size=count, max_size=count))
    return toy.experts(ranks, scales, draw(st.integers(0, 9))), weights


@settings(max_examples=60)
@given(cases())
def test_any_constant_mixture(case: tuple[dict[str, lw.Expert], list[float]]) -> None:
    experts, weights = case
    ids = torch.tensor([[1, 2, 3], [8, 0, 2]])
    host = toy.Toy().double()
    bare = host(ids)
    mixture = lw.attach(host, experts, lw.Sum(weights=dict(zip(experts, weights, strict=True))))
    expected = toy.slow(experts, weights, ids)
    tight = {"atol": 1e-11, "rtol": 1e-11}
    assert_close(host(ids), expected, **tight)
    with torch.no_grad():
        assert_close(host(ids), expected, **tight)
        assert_close(host(ids[0]), expected[0], **tight)
    first = next(iter(experts))
    with mixture.only(first):
        alone = toy.slow(experts, [weights[0]] + [0.0] * (len(experts) - 1), ids)
        assert_close(host(ids), alone, **tight)
    mixture.fold()
    assert_close(host(ids), expected, **tight)
    mixture.unfold()
    if any(w and f.scale for w, e in zip(weights, experts.values(), strict=True) for f in e.factors.values()):
        exported = mixture.merged_expert()
        mixture.detach()
        lw.attach(host, {"one": exported}, lw.Sum())
        assert_close(host(ids), expected, **tight)
    else:
        with pytest.raises(lw.LoraweaveError, match="no LoRA to write"):
            mixture.merged_expert()
        mixture.detach()
        assert torch.equal(host(ids), bare)


@settings(max_examples=30)
@given(cases())
def test_banks(case: tuple[dict[str, lw.Expert], list[float]]) -> None:
    experts, weights = case
    for module, (wide, out) in toy.WIDTHS.items():
        factors = [e.factors.get(module) for e in experts.values()]
        if not any(factors):
            continue
        bank = Bank.stack(factors, torch.float64, torch.device("cpu"))
        delta = torch.zeros(out, wide, dtype=torch.float64)
        for i, f in enumerate(factors):
            got = bank.factors(i)
            if f is None:
                assert got is None
                continue
            assert got is not None
            assert torch.equal(got.A, f.A)
            assert torch.equal(got.B, f.B)
            assert got.scale == f.scale
            assert got.A.data_ptr() == bank.A[bank.layout.offsets[i] :].data_ptr(), "a copy, not a view"
            delta += weights[i] * f.scale * f.B @ f.A
        assert_close(bank.delta(torch.tensor(weights)), delta, atol=1e-6, rtol=1e-6)
        exact = torch.tensor(weights, dtype=torch.float64)
        assert_close(bank.delta(exact), delta, atol=1e-12, rtol=1e-12)
        assert_close(exact @ bank.layout.spread(bank.A), bank.layout.row_weights(exact), atol=0, rtol=0)
        index, scales = bank.layout.padded_rows(bank.A)
        for i, f in enumerate(factors):
            rank = 0 if f is None else f.rank
            assert index[i, :rank].tolist() == list(range(bank.layout.offsets[i], bank.layout.offsets[i] + rank))
            assert (scales[i, rank:] == 0).all()
            assert (scales[i, :rank] == (0.0 if f is None else f.scale)).all()


def test_equal_arrangements_share_a_layout() -> None:
    assert layout((1, 0, 2), (1.0, 0.0, 0.5)) is layout((1, 0, 2), (1.0, 0.0, 0.5))
    assert layout((1, 0, 2), (1.0, 0.0, 0.5)) is not layout((1, 2, 0), (1.0, 0.5, 0.0))


def test_a_scale_keeps_its_precision_in_half_precision_models() -> None:
    """A bank in bfloat16 must not round alpha / r as well: peft does not."""
    experts = toy.experts({"up": [2]}, [0.7])
    host = toy.Toy().bfloat16()
    mixture = lw.attach(host, experts, lw.Sum())
    factors = mixture.layers["up"].bank.factors(0)
    expected = 0.7 * factors.B.double() @ factors.A.double()
    assert_close(mixture.layers["up"].bank.delta(torch.ones(1)), expected, atol=1e-12, rtol=1e-12)


def test_first_use_under_inference_mode_does_not_spoil_training() -> None:
    experts = toy.experts({"up": [2, 1], "down": [1, 3]}, [0.123, 0.456])
    mixture = lw.attach(toy.Toy(), experts, lw.MoLE(granularity="matrix"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        mixture.model(ids)
    mixture.model(ids).sum().backward()
    assert all(p.grad is not None for name, p in mixture.gate_parameters() if name.endswith("/e"))


def test_experts_are_in_memory_once() -> None:
    """Weights that select a run of experts are views of the bank."""
    experts = toy.experts({"up": [2, 1, 2], "down": [1, 3, 1]}, [1.0, 1.0, 1.0])
    mixture = lw.attach(toy.Toy(), experts, lw.Sum())
    for weights in (lw.Sum(), lw.Linear(), lw.Sum(0.0, {"e1": 1.0})):
        mixture.policy = weights
        for layer in mixture.layers.values():
            storage = layer.bank.A.untyped_storage().data_ptr()
            assert layer.fixed.A.untyped_storage().data_ptr() == storage
            assert layer.fixed.Bt.untyped_storage().data_ptr() == layer.bank.Bt.untyped_storage().data_ptr()
    assert all(not e.factors for e in mixture.sources)


def test_a_layer_answers_for_its_base() -> None:
    mixture = lw.attach(toy.Toy(), toy.experts({"up": [1]}, [1.0]), lw.Sum())
    up = mixture.model.up
    assert up.weight is up.base.weight
    assert (up.in_features, up.out_features) == (toy.WIDE, toy.INNER)
    with pytest.raises(AttributeError, match="nothing_here"):
        up.nothing_here  # noqa: B018


GATES: Any = [("block", "outputs"), ("block", "hidden"), ("network", "outputs"), ("layer", "outputs")]


@pytest.mark.parametrize("policy", [lw.MoLE(g, scale="experts", evidence=e) for g, e in GATES])
def test_gates_on_a_plain_module(policy: Any) -> None:
    """Without blocks each module is a site of its own."""
    experts = toy.experts({"embed": [1, 2], "up": [2, 0], "down": [1, 1]}, [1.0, 0.5])
    mixture = lw.attach(toy.Toy().double(), experts, policy)
    assert {site.name for site in mixture.sites} >= {"embed", "up", "down"} or policy.granularity == "network"
    assert_close(
        mixture.model(torch.tensor([[1, 2]])),
        toy.slow(experts, [1.0, 1.0], torch.tensor([[1, 2]])),
        atol=1e-6,
        rtol=1e-6,
    )
