"""Masking (the second inference mode) for every policy: shares, totals, nesting, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from methods import METHODS, PROMPT, ROUTED

ALL = METHODS | PROMPT


def first_weights(mixture: Mixture, inputs: Any) -> Tensor:
    """Weights at the first site to run, whose evidence does not depend on the weights."""
    with mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    return next(iter(seen.weights.values())).double()


def total(policy: Any, kept: int) -> float:
    """DESIGN: with a scale s, K of N experts share 1 + (s - 1)(K - 1)/(N - 1)."""
    scale = 1.0
    if isinstance(policy, lw.MoLE) and policy.activation != "top1":
        scale = 3.0 if policy.scale == "experts" else policy.scale
    return 1 + (scale - 1) * (kept - 1) / 2


@pytest.mark.parametrize("method", ALL)
def test_masked_weights(mixed: Any, method: str) -> None:
    policy = ALL[method]
    mixture, inputs = mixed("llama", policy), tiny.batch("llama")
    free = first_weights(mixture, inputs)
    chooses = getattr(policy, "activation", "") in ("top1", "topk") or getattr(policy, "preselect", None)
    sparse = chooses or method in ROUTED
    for kept in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        mask = torch.tensor([i in kept for i in range(3)])
        names = [tiny.NAMES[i] for i in kept]
        if method == "linear-weights" and kept == [1]:
            continue  # bee has no weight of its own; see below
        with mixture.only(*names):
            g = first_weights(mixture, inputs)
        with mixture.without(*(n for n in tiny.NAMES if n not in names)):
            assert torch.equal(first_weights(mixture, inputs), g)
        assert (g[..., ~mask] == 0).all()
        if method.startswith("lora_flow"):  # the offsets stay as they are, the softmax is shared out
            offsets = next(iter(mixture.gates.values())).b.double()
            shares = (free - offsets) * mask / ((free - offsets) * mask).sum(-1, keepdim=True)
            assert_close(g, (shares + offsets) * mask, atol=1e-6, rtol=1e-5)
        elif not policy.normalized:
            assert_close(g, free * mask)
        elif sparse:
            assert_close(g.sum(-1), torch.full_like(g[..., 0], total(policy, len(kept))))
        else:
            shares = free * mask / (free * mask).sum(-1, keepdim=True)
            assert_close(g, total(policy, len(kept)) * shares, atol=1e-6, rtol=1e-5)
    assert torch.equal(first_weights(mixture, inputs), free)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_masked_top_k_takes_the_best_that_are_left(mixed: Any, pooling: Any) -> None:
    inputs = tiny.batch("llama")
    soft = first_weights(mixed("llama", lw.MoLE(pooling=pooling, scale=1.0)), inputs)
    for activation, k in (("topk", 1), ("topk", 2), ("topk", 9), ("top1", 1)):
        mixture = mixed("llama", lw.MoLE(pooling=pooling, activation=activation, k=k, scale=1.0))
        for kept in ([0, 1, 2], [0, 2], [1]):
            with mixture.only(*(tiny.NAMES[i] for i in kept)):
                g = first_weights(mixture, inputs)
            left = torch.full_like(soft, 0.0)
            left[..., kept] = soft[..., kept]
            index = left.topk(min(k, len(kept)), dim=-1).indices
            best = torch.zeros_like(left).scatter(-1, index, left.gather(-1, index))
            assert_close(g, best / best.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_contexts_nest_and_restore(mixed: Any, method: str) -> None:
    mixture, inputs = mixed("llama", ALL[method]), tiny.batch("llama")
    free = tiny.logits(mixture.model, inputs)
    with mixture.without("bee"):
        two = tiny.logits(mixture.model, inputs)
        with mixture.only("ant", "bee"):
            one = tiny.logits(mixture.model, inputs)
        assert torch.equal(tiny.logits(mixture.model, inputs), two)
        with pytest.raises(ZeroDivisionError), mixture.without("cat"):
            raise ZeroDivisionError
        assert torch.equal(tiny.logits(mixture.model, inputs), two)
        with pytest.raises(lw.LoraweaveError, match="every expert is masked; keep at least one of: ant, bee, cat"):
            mixture.only("bee").__enter__()
        assert torch.equal(tiny.logits(mixture.model, inputs), two)
    with mixture.only("ant"):
        assert torch.equal(tiny.logits(mixture.model, inputs), one)
    assert torch.equal(tiny.logits(mixture.model, inputs), free)
    assert not torch.equal(one, free)


@pytest.mark.parametrize("method", ["sum", "linear", "mole", "mole-topk"])
def test_masks_are_checked(mixed: Any, method: str) -> None:
    mixture, inputs = mixed("llama", ALL[method]), tiny.batch("llama")
    free = tiny.logits(mixture.model, inputs)
    for context in (mixture.only(), mixture.without(*tiny.NAMES)):
        with pytest.raises(lw.LoraweaveError, match="every expert is masked"), context:
            pass
    hint = r"unknown expert 'bea'; did you mean 'bee'\? \(known: ant, bee, cat\)"
    for context in (mixture.only("ant", "bea"), mixture.without("bea")):
        with pytest.raises(lw.LoraweaveError, match=hint):
            context.__enter__()
    with mixture.without():
        assert torch.equal(tiny.logits(mixture.model, inputs), free)
    assert torch.equal(tiny.logits(mixture.model, inputs), free)


def test_experts_without_weight_cannot_be_kept_alone(mixed: Any) -> None:
    mixture, inputs = mixed("llama", METHODS["linear-weights"]), tiny.batch("llama")
    free = tiny.logits(mixture.model, inputs)
    with pytest.raises(lw.LoraweaveError, match=r"the experts kept \(bee\) have weight 0"):
        mixture.only("bee").__enter__()
    assert torch.equal(tiny.logits(mixture.model, inputs), free)
    with mixture.only("ant", "bee"):
        assert_close(first_weights(mixture, inputs), torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64))


def test_policy_set_under_a_mask_is_masked(mixed: Any) -> None:
    mixture, inputs = mixed("llama", lw.Sum()), tiny.batch("llama")
    with mixture.only("ant"):
        expected = tiny.logits(mixture.model, inputs)
        for policy in (lw.Linear(), lw.MoLE(), lw.MoLE(mix="outputs", evidence="outputs", gate_form="full")):
            mixture.policy = policy
            assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-9, rtol=1e-9)
        with pytest.raises(lw.LoraweaveError, match="have weight 0"):
            mixture.policy = lw.Linear({"cat": 1.0})
        assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-9, rtol=1e-9)
    mixture.policy = lw.Sum()
    assert (tiny.logits(mixture.model, inputs) - expected).abs().max() > 1e-2


def test_masking_changes_no_gate_parameter(mixed: Any) -> None:
    mixture = mixed("t5", lw.MoLE())
    before = {name: p.clone() for name, p in mixture.gate_parameters()}
    with mixture.only("cat"):
        tiny.logits(mixture.model, tiny.batch("t5"))
    assert all(torch.equal(p, before[name]) for name, p in mixture.gate_parameters())
