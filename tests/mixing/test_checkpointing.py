"""Gradient checkpointing recomputes blocks in the backward pass; gradients must be the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from loraweave.training import objective

POLICIES = {
    "block": lw.MoLE(),
    "matrix": lw.MoLE("matrix", gate_form="full"),
    "layer": lw.MoLE("layer", pooling="mean"),
    "network": lw.MoLE("network", pooling="mean"),
    "topk": lw.MoLE(activation="topk", pooling="mean", k=1, scale=1.0),
    "topk network": lw.MoLE("network", activation="topk", pooling="mean", k=1),
    "topk ahead": lw.MoLE(activation="topk", pooling="prompt", k=1),
    "outputs": lw.MoLE(mix="outputs", evidence="outputs", gate_form="full"),
}


def gradients(mixture: Mixture, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    mixture.model.zero_grad(set_to_none=True)
    loss = mixture.model(**inputs, use_cache=False).loss
    (loss + 0.3 * objective.balance([s for s in mixture.sites if s.gate is not None])).backward()
    return loss.detach(), {n: p.grad.clone() for n, p in mixture.gate_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [(5, 3), (40, 31)])  # the longer ones fetch only the rank rows that are used
@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_gradients_with_and_without_checkpointing(architecture: str, lengths: tuple[int, ...]) -> None:
    mixture, inputs = tiny.attached(architecture, lw.Sum(), torch.float64), tiny.batch(architecture, lengths)
    inputs["labels"] = inputs.pop("decoder_input_ids") if architecture == "t5" else inputs["input_ids"]
    mixture.model.train()
    for name, policy in POLICIES.items():
        mixture.policy = policy
        tiny.randomize(mixture)
        loss, expected = gradients(mixture, inputs)
        mixture.model.activation_checkpointing_enable({"use_reentrant": False})
        again, got = gradients(mixture, inputs)
        mixture.model.activation_checkpointing_disable()
        assert_close(again, loss, atol=0, rtol=1e-12)
        assert got.keys() == expected.keys() != set()
        for key, g in expected.items():
            assert_close(got[key], g, atol=1e-9, rtol=1e-6, msg=lambda m, n=name, k=key: f"{n}, {k}: {m}")
