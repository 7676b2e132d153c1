"""Half precision, autocast, casts after attaching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing.types import Evidence

POLICIES = {
    "sum": lw.Sum(),
    "linear": lw.Linear(),
    "token": lw.MoLE(granularity="matrix"),
    "mean": lw.MoLE(pooling="mean", activation="topk", k=2, scale=1.0),
    "layer norm": lw.MoLE(normalization="layer", gate_form="full", pooling="mean"),
    "hidden": lw.MoLE(evidence="hidden", normalization="rms"),
    "outputs": lw.MoLE(mix="outputs", evidence="outputs", gate_form="full"),
}
HALVES = (torch.bfloat16, torch.float16)


def away(a: Tensor, b: Tensor) -> float:
    """Distance relative to length."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("name", POLICIES)
def test_half_precision_models(architecture: str, name: str, dtype: torch.dtype) -> None:
    inputs = tiny.batch(architecture)
    whole = tiny.randomize(tiny.attached(architecture, POLICIES[name]), strength=0.3)
    half = tiny.randomize(tiny.attached(architecture, POLICIES[name], dtype), strength=0.3)
    out = tiny.logits(half.model, inputs)
    assert out.dtype == dtype
    assert all(p.dtype == torch.float32 for _, p in half.gate_parameters())
    assert all(layer.bank.A.dtype == dtype for layer in half.layers.values())
    # The bare models themselves are about 0.008 away in bfloat16, 0.001 in float16.
    assert away(out, tiny.logits(whole.model, inputs)) < (0.12 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", POLICIES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    inputs = tiny.batch("llama", (16, 9))
    # A seed with which no two experts nearly tie: half precision would choose the other one.
    mixture = tiny.randomize(tiny.attached("llama", POLICIES[name]), seed=1, strength=0.3)
    with mixture.record() as seen:
        expected = tiny.logits(mixture.model, inputs)
    with torch.autocast("cpu", dtype), mixture.record() as cast:
        out = tiny.logits(mixture.model, inputs)
    assert away(out, expected) < (0.05 if dtype == torch.bfloat16 else 0.01)
    for site, g in seen.weights.items():
        if getattr(POLICIES[name], "activation", "") != "topk":
            assert_close(cast.weights[site], g, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("evidence", ["outputs", "hidden"])
def test_gates_decide_in_single_precision_under_autocast(evidence: Any, dtype: torch.dtype) -> None:
    """Squares of large evidence overflow half precision, and small differences between experts drown in it."""
    mixture = tiny.attached("llama", lw.MoLE(evidence=evidence))
    tiny.randomize(mixture, strength=20.0)
    site = mixture.sites[0]
    rows = site.plan.bank.layout.rows
    hidden, ranks = 500 * torch.randn(2, 3, tiny.WIDTH), 500 * torch.randn(2, 3, rows)
    read = Evidence(hidden, ranks, site.stream)
    assert site.gate is not None
    expected = site.gate(read).dense
    with torch.autocast("cpu", dtype):
        assert_close(site.gate(read).dense, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", POLICIES)
def test_a_cast_after_attaching_is_a_cast_before(name: str, dtype: torch.dtype) -> None:
    inputs = tiny.batch("llama")
    after = tiny.randomize(tiny.attached("llama", POLICIES[name]))
    gates = {key: p.clone() for key, p in after.gate_parameters()}
    after.model.to(dtype)
    before = tiny.randomize(tiny.attached("llama", POLICIES[name], dtype, seed_dtype=torch.float32))
    assert all(torch.equal(p, gates[key]) for key, p in after.gate_parameters()), "gates keep their precision"
    out, expected = tiny.logits(after.model, inputs), tiny.logits(before.model, inputs)
    if getattr(POLICIES[name], "evidence", "") == "outputs" and POLICIES[name].mix == "deltas":
        # These gates know the experts as precisely as they were when the gates were made.
        assert away(out, expected) < 0.03
    else:
        assert torch.equal(out, expected)
    after.model.float()
    tiny.logits(after.model, inputs)


def test_experts_of_several_dtypes() -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    dtypes = {"ant": torch.float16, "bee": torch.bfloat16, "cat": torch.float32}
    kind = tiny.ARCHITECTURES["llama"]
    experts = {n: tiny.expert(host, kind.targets, 2, seed=i, dtype=d) for i, (n, d) in enumerate(dtypes.items())}
    lw.attach(host, experts, lw.Sum())
    slow = tiny.slow_mixture(tiny.model("llama"), experts, lambda _: torch.ones(1, 1, 3))
    assert_close(tiny.logits(host, inputs), tiny.logits(slow, inputs), atol=2e-5, rtol=1e-5)


def test_training_in_half_precision_moves_gates() -> None:
    mixture = tiny.attached("llama", lw.MoLE(), torch.bfloat16)
    inputs = tiny.batch("llama")
    mixture.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, p in mixture.gate_parameters():
        if name.endswith("/e"):
            assert p.grad.dtype == torch.float32
            assert p.grad.abs().max() > 0


def test_default_dtype_does_not_matter() -> None:
    inputs = tiny.batch("llama")
    mixture = tiny.attached("llama", lw.Linear())
    expected = tiny.logits(mixture.model, inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixture.policy = lw.Linear()
        assert_close(tiny.logits(mixture.model, inputs), expected, atol=0, rtol=0)
        mixture.policy = lw.MoLE(scale=1.0)
        assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_masks_move_with_the_model() -> None:
    mixture = tiny.attached("llama", lw.MoLE())
    with mixture.only("ant"):
        mixture.model.to("meta")
        assert all(gate.closed.device.type == "meta" for gate in mixture.gates.values())
        mixture.model.half()
        assert all(gate.closed.dtype == torch.bool for gate in mixture.gates.values())
