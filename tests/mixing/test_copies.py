"""Copies of a model with a mixture are models with mixtures of their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny

POLICIES = {
    "sum": lw.Sum(),
    "mean": lw.MoLE(pooling="mean"),
    "topk": lw.MoLE(activation="topk", pooling="mean", scale=1.0),
    "outputs": lw.MoLE(mix="outputs", evidence="outputs", gate_form="full"),
}


@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize("name", POLICIES)
def test_deepcopy(architecture: str, name: str) -> None:
    mixture = tiny.randomize(tiny.attached(architecture, POLICIES[name]))
    if architecture == "t5" and name in ("mean", "topk"):
        mixture.policy = lw.MoLE(activation=POLICIES[name].activation)
        tiny.randomize(mixture)
    short, other = tiny.batch(architecture, (7, 2, 3)), tiny.batch(architecture, (9, 9, 4), seed=4)
    expected = tiny.logits(mixture.model, short)
    mixture.model(**other)  # leaves weights behind that hang on a graph
    twin = copy.deepcopy(mixture)
    model = copy.deepcopy(mixture.model)
    for made in (twin.model, model):
        assert made is not mixture.model
        assert torch.equal(tiny.logits(made, short), expected)
    with torch.no_grad():
        for _, p in twin.gate_parameters():
            p.add_(1.0).mul_(-2.0)
    if mixture.gates:
        assert not torch.equal(tiny.logits(twin.model, short), expected)
    with twin.only("ant"):
        assert torch.equal(tiny.logits(mixture.model, short), expected)
    twin.detach()
    assert_close(tiny.logits(twin.model, short), tiny.logits(tiny.model(architecture), short), atol=0, rtol=0)
    assert torch.equal(tiny.logits(mixture.model, short), expected)
    mixture.detach()
    assert torch.equal(tiny.logits(model, short), expected)


def test_pickle() -> None:
    """``torch.save`` of a whole model, and processes that are started with one."""
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE(pooling="mean")))
    inputs = tiny.batch("llama")
    expected: Any = tiny.logits(mixture.model, inputs)
    mixture.model(**inputs)
    file = io.BytesIO()
    torch.save(mixture.model, file)
    file.seek(0)
    assert torch.equal(tiny.logits(torch.load(file, weights_only=False), inputs), expected)
