"""Sparse gates with one decision a row compute only the rank rows they use; the result is that of the dense path."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing.site import Site
from loraweave.mixture import Mixture
from loraweave.policies.mole_gate import MoLEGate


def many_experts(architecture: str) -> Mixture:
    """Six experts of different ranks; some do not touch some modules."""
    host = tiny.model(architecture, torch.float64)
    kind = tiny.ARCHITECTURES[architecture]
    made = {}
    for i in range(6):
        targets = kind.targets if i % 2 else kind.attention
        made[f"e{i}"] = tiny.expert(host, targets, 1 + i % 3, 0.3 + 0.1 * i, seed=i)
    return lw.attach(host, made, lw.Sum())


@pytest.fixture(scope="module")
def mixtures() -> dict[str, Mixture]:
    return {architecture: many_experts(architecture) for architecture in ("t5", "llama")}


def gradients(mixture: Mixture, inputs: Any) -> dict[str, Tensor]:
    mixture.model.zero_grad(set_to_none=True)
    (mixture.model(**inputs).logits ** 2).mean().backward()
    return {name: p.grad.clone() for name, p in mixture.gate_parameters() if p.grad is not None}


POLICIES = {
    "top1": lw.MoLE(activation="top1", pooling="mean"),
    "top2": lw.MoLE(activation="topk", k=2, pooling="mean", scale=1.0),
    "top3 matrix": lw.MoLE("matrix", activation="topk", k=3, pooling="mean", scale=2.0),
    "top2 network": lw.MoLE("network", activation="topk", k=2, pooling="mean"),
}


@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize("name", POLICIES)
def test_sparse_equals_dense(mixtures: Any, monkeypatch: Any, architecture: str, name: str) -> None:
    mixture, inputs = mixtures[architecture], tiny.batch(architecture, (16, 12, 9))
    mixture.policy = POLICIES[name]
    tiny.randomize(mixture)
    used: list[bool] = []
    real = Site.few_rows

    def watched(self: Site, *args: Any) -> Any:
        rows = real(self, *args)
        used.append(rows is not None)
        return rows

    monkeypatch.setattr(Site, "few_rows", watched)
    sparse = tiny.logits(mixture.model, inputs)
    assert sum(used) > len(used) / 4, "the sparse path was hardly taken"
    with mixture.only("e1", "e4"):
        sparse_masked = tiny.logits(mixture.model, inputs)
    sparse_gradients = gradients(mixture, inputs)
    monkeypatch.setattr(Site, "few_rows", lambda *_: None)
    assert_close(sparse, tiny.logits(mixture.model, inputs), atol=1e-9, rtol=1e-9)
    with mixture.only("e1", "e4"):
        assert_close(sparse_masked, tiny.logits(mixture.model, inputs), atol=1e-9, rtol=1e-9)
    dense_gradients = gradients(mixture, inputs)
    assert dense_gradients.keys() == sparse_gradients.keys()
    for key, gradient in dense_gradients.items():
        assert_close(sparse_gradients[key], gradient, atol=1e-7, rtol=1e-4)


def test_gates_that_decide_for_each_token_take_the_dense_path(mixtures: Any, monkeypatch: Any) -> None:
    mixture = mixtures["llama"]
    mixture.policy = lw.MoLE(activation="top1", pooling="token")
    real, used = Site.few_rows, []
    monkeypatch.setattr(Site, "few_rows", lambda self, *args: used.append(real(self, *args)))
    tiny.logits(mixture.model, tiny.batch("llama", (16, 12)))
    assert used
    assert all(rows is None for rows in used)


def test_what_the_prompt_chose_is_fetched_once_an_answer(mixtures: Any, monkeypatch: Any) -> None:
    """One token after another with a cache: against the dense path, and with gates changed in mid-answer."""
    mixture = mixtures["llama"]
    mixture.policy = lw.MoLE(activation="topk", k=2, pooling="prompt", scale=1.0)
    tiny.randomize(mixture)
    inputs = tiny.batch("llama", (9,))
    gate: Any = next(iter(mixture.gates.values()))

    def answer() -> list[Tensor]:
        with torch.no_grad():
            out: Any = mixture.model(**inputs, use_cache=True)
            cache, steps = out.past_key_values, []
            for step in range(6):
                if step == 2:
                    gate.scale.mul_(1.5)
                with mixture.only("e1", "e2", "e4") if step >= 4 else contextlib.nullcontext():
                    steps.append(mixture.model(torch.tensor([[5 + step]]), past_key_values=cache).logits)
            gate.scale.div_(1.5)
        return steps

    real, kept = Site.few_rows, []

    def watched(self: Site, *args: Any) -> Any:
        rows = real(self, *args)
        kept.append((self._fetched or {}).get(args[0]))
        assert kept[-1] is None or rows[0] is kept[-1][0]
        return rows

    monkeypatch.setattr(Site, "few_rows", watched)
    sparse = answer()
    again = [fetched for fetched in kept if fetched is not None]
    assert len(again) > len(kept) / 6, "nothing was kept"
    assert len({id(fetched) for fetched in again}) < len(again)
    monkeypatch.setattr(Site, "few_rows", lambda *_: None)
    monkeypatch.setattr(MoLEGate, "_decided", lambda self, logits, _: self.activate(logits))
    for one, other in zip(sparse, answer(), strict=True):
        assert_close(one, other, atol=1e-9, rtol=1e-9)
