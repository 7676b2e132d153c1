"""Models whose halves are on two devices, as ``device_map`` spreads them over GPUs: they mix as whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import methods
import tiny
from elsewhere import elsewhere, spread
from loraweave.mixture import Mixture
from loraweave.training import objective

POLICIES = methods.METHODS | methods.PROMPT
QUICK = ("sum", "mole", "mole-network", "mole-preselect", "logo")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with elsewhere():
        yield


def pair(architecture: str, policy: Any) -> tuple[Mixture, Mixture]:
    """The same mixture of a whole model and of one in two halves."""
    experts = tiny.experts(tiny.model(architecture), architecture, torch.float64)
    try:
        whole = tiny.randomize(lw.attach(tiny.model(architecture, torch.float64), experts, policy))
    except lw.LoraweaveError as error:
        pytest.skip(str(error))
    halves = tiny.alike(whole, lw.attach(spread(tiny.model(architecture, torch.float64)), experts, policy))
    assert len({layer.bank.device for layer in halves.layers.values()}) == 2
    return whole, halves


def same(whole: Mixture, halves: Mixture, inputs: dict[str, Tensor]) -> None:
    assert_close(tiny.logits(halves.model, inputs), tiny.logits(whole.model, inputs))


def gradients(mixture: Mixture, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = mixture.model(**inputs).logits.sin().sum()
    if isinstance(mixture.policy, lw.MoLE):
        ran = [site for site in mixture.sites if site.current is not None]
        loss = loss + objective.balance(ran).to(loss.device)
    loss.backward()
    return {name: p.grad.cpu() for name, p in mixture.gate_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_two_halves_mix_as_a_whole_model(architecture: str, name: str) -> None:
    whole, halves = pair(architecture, POLICIES[name])
    inputs = tiny.batch(architecture)
    same(whole, halves, inputs)
    with whole.only("ant", "cat"), halves.only("ant", "cat"):
        same(whole, halves, inputs)
    if whole.policy.mix == "deltas":
        rows = [{"ant": 1.0}, {"bee": 0.5, "cat": -1.0}, {}]
        with whole.rows(rows), halves.rows(rows):
            same(whole, halves, inputs)
    if any(p.requires_grad for _, p in whole.gate_parameters()):
        assert_close(gradients(halves, inputs), gradients(whole, inputs))
    with whole.record() as expected, halves.record() as log:
        same(whole, halves, inputs)
    for site, weights in expected.average().items():
        assert log.average()[site] == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("name", ["sum", "mole-network", pytest.param("mole-prompt", marks=pytest.mark.slow)])
def test_two_halves_generate_as_a_whole_model(name: str) -> None:
    whole, halves = pair("llama", POLICIES[name])
    inputs = tiny.batch("llama", side="left")
    inputs.pop("position_ids")
    expected = whole.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(halves.model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
