"""Policies as the user writes them: options, names, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from loraweave.policies import registry
from methods import METHODS


@pytest.fixture(scope="module")
def llama() -> Mixture:
    return tiny.attached("llama", lw.Sum())


def constants(mixture: Mixture, policy: Any) -> dict[str, list[float]]:
    mixture.policy = policy
    return {site.name: site.constant.tolist() for site in mixture.sites}


def test_sum(llama: Mixture) -> None:
    assert set(map(tuple, constants(llama, lw.Sum()).values())) == {(1.0, 1.0, 1.0)}
    assert set(map(tuple, constants(llama, lw.Sum(0.25)).values())) == {(0.25, 0.25, 0.25)}
    assert set(map(tuple, constants(llama, lw.Sum(weights={"cat": -2})).values())) == {(1.0, 1.0, -2.0)}


def test_linear(llama: Mixture) -> None:
    assert set(map(tuple, constants(llama, lw.Linear()).values())) == {(1 / 3, 1 / 3, 1 / 3)}
    assert set(map(tuple, constants(llama, lw.Linear({"ant": 3, "cat": 1})).values())) == {(0.75, 0.0, 0.25)}
    assert set(map(tuple, constants(llama, lw.Linear({"ant": 3, "cat": -1})).values())) == {(1.5, 0.0, -0.5)}


def test_linear_by_block(llama: Mixture) -> None:
    found = constants(
        llama,
        lw.Linear(
            {"ant": 1},
            blocks={"model.layers.1": {"bee": 1}, "*.down_proj": {"cat": 2}, "*.1.mlp.up_proj": {"ant": 1, "bee": 1}},
        ),
    )
    assert found["model.layers.0.self_attn.q_proj"] == [1.0, 0.0, 0.0]
    assert found["model.layers.1.self_attn.q_proj"] == [0.0, 1.0, 0.0], "what lies in a block"
    assert found["model.layers.0.mlp.down_proj"] == [0.0, 0.0, 1.0]
    assert found["model.layers.1.mlp.down_proj"] == [0.0, 0.0, 1.0], "the last pattern that matches wins"
    assert found["model.layers.1.mlp.up_proj"] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lw.Sum(weights={"cot": 1.0}), r"unknown expert 'cot'; did you mean 'cat'\? \(known: ant, bee, cat\)"),
        (lw.Linear({"cot": 1.0}), "unknown expert 'cot'"),
        (lw.Linear(blocks={"*": {"cot": 1.0}}), "unknown expert 'cot'"),
        (lw.Linear({"cat": float("nan")}), "weight of 'cat': expected a finite number, got nan"),
        (lw.Linear({"cat": "much"}), "weight of 'cat': expected a finite number, got 'much'"),  # type: ignore[dict-item]
        (lw.Linear({"ant": 1, "cat": -1}), "sum to 0 and cannot be normalised"),
        (lw.Linear({}), "sum to 0"),
        (lw.Linear(blocks={"model.layer.0": {"cat": 1.0}}), r"'model.layer.0' fits no module that an expert extends"),
    ],
)
def test_weights_are_checked_and_the_old_policy_stays(llama: Mixture, policy: Any, message: str) -> None:
    llama.policy = lw.Sum(0.5)
    inputs = tiny.batch("llama")
    before = tiny.logits(llama.model, inputs)
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        llama.policy = policy
    assert "\n" not in str(error.value)
    assert llama.policy == lw.Sum(0.5)
    assert torch.equal(tiny.logits(llama.model, inputs), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "blok"}, r"unknown mole granularity 'blok'; did you mean 'block'\?"),
        ({"evidence": "output"}, "did you mean 'outputs'"),
        ({"pooling": "max"}, r"unknown mole pooling 'max'.*\(known: auto, mean, prompt, token, flatten\)"),
        ({"normalization": "batch"}, "unknown mole normalization"),
        ({"gate_form": "small"}, "unknown mole gate_form"),
        ({"activation": "relu"}, "unknown mole activation"),
        ({"mix": "delta"}, "did you mean 'deltas'"),
        ({"temperature": 0}, "temperature: expected a finite number larger than 0, got 0"),
        ({"temperature": float("inf")}, "temperature"),
        ({"scale": -1.0}, "scale: expected a finite number larger than 0, got -1.0"),
        ({"scale": True}, "scale"),
        ({"scale": "expert"}, "scale"),
        ({"balance": -0.1}, "balance"),
        ({"k": 0}, "k: expected a whole number of at least 1, got 0"),
        ({"k": 1.5}, "k: expected a whole number"),
        ({"pooling": "flatten"}, "max_length: a flatten gate needs the longest sequence"),
        ({"pooling": "flatten", "max_length": 0}, "max_length"),
    ],
)
def test_mole_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        lw.MoLE(**options)
    assert "\n" not in str(error.value)


def test_paper() -> None:
    assert (lw.MoLE.paper().scale, lw.MoLE.paper().gate_form) == (1.0, "full")
    assert lw.MoLE.paper(granularity="layer", scale=2.0) == lw.MoLE(
        "layer", "outputs", normalization="l2", gate_form="full", scale=2.0, balance=0.5
    )


def test_prompt_needs_a_prompt() -> None:
    host = tiny.model("t5")
    blind = {"a": tiny.expert(host, ["SelfAttention.q"], 2)}
    with pytest.raises(lw.LoraweaveError, match=r"decoder.block.0: pooling='prompt' needs to see the prompt"):
        lw.attach(host, blind, lw.MoLE(pooling="prompt"))
    tiny.logits(tiny.attached("t5", lw.MoLE(pooling="prompt")).model, tiny.batch("t5"))
    tiny.logits(tiny.attached("bert", lw.MoLE(pooling="prompt")).model, tiny.batch("bert"))


@pytest.mark.parametrize("name", METHODS)
def test_policies_are_plain_data(name: str) -> None:
    policy = METHODS[name]
    assert registry.from_dict(json.loads(json.dumps(registry.to_dict(policy)))) == policy
    assert registry.to_dict(policy)["name"] == policy.name
    assert set(registry.options(policy.name)) == set(registry.to_dict(policy)) - {"name"}
    with pytest.raises(AttributeError):
        policy.name_of_nothing = 1


def test_registry_errors() -> None:
    with pytest.raises(lw.LoraweaveError, match=r"unknown method 'mol'; did you mean 'mole'\?"):
        registry.get("mol")
    near = r"unknown option of method 'mole' 'granularty'; did you mean 'granularity'"
    with pytest.raises(lw.LoraweaveError, match=near):
        registry.from_dict({"name": "mole", "granularty": "block"})
    for nameless in ({}, {"name": 3}):
        with pytest.raises(lw.LoraweaveError, match="method: expected a field 'name'"):
            registry.from_dict(nameless)
    with pytest.raises(lw.LoraweaveError, match="two policies are called 'sum'"):
        registry.register(type("Other", (), {"name": "sum"}))


def test_mixtures_of_one_expert() -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    one = {"ant": tiny.experts(host, "llama")["ant"]}
    mixture = lw.attach(host, one, lw.Sum())
    expected = tiny.logits(host, inputs)
    options: list[dict[str, Any]] = [
        {},
        {"activation": "top1"},
        {"activation": "topk"},
        {"mix": "outputs", "evidence": "outputs", "gate_form": "full"},
    ]
    for option in options:
        mixture.policy = lw.MoLE(**option)
        tiny.randomize(mixture)
        assert_close(tiny.logits(host, inputs), expected, atol=1e-5, rtol=1e-5)
        with mixture.only("ant"):
            assert_close(tiny.logits(host, inputs), expected, atol=1e-5, rtol=1e-5)
        mixture.model(**inputs).logits.sum().backward()
