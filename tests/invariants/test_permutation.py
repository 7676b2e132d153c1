"""Invariant 3, first half: the order of experts permutes the weights and changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from methods import METHODS, PROMPT

ORDER = ["cat", "ant", "bee"]
PICK = [tiny.NAMES.index(name) for name in ORDER]


def permuted(name: str, parameter: Tensor, mixture: Mixture) -> Tensor:
    """A gate's parameter, for the experts in the other order."""
    if name.endswith(("/log_temperature", "/scale")):
        return parameter
    if name.endswith("/W"):
        return parameter[PICK]
    gate = mixture.gates[name.rpartition("/")[0]]
    standard = "/standard." in name
    if not standard:
        parameter = parameter[..., PICK]
    if not (standard or name.endswith("/e")) or gate.policy.evidence == "hidden":
        return parameter
    if gate.policy.gate_form == "full":
        return parameter[..., PICK, :, :]
    layout = next(site for site in mixture.sites if site.gate is gate).plan.bank.layout
    rows = [row for i in PICK for row in range(layout.offsets[i], layout.offsets[i] + layout.ranks[i])]
    return parameter[rows] if standard else parameter[..., rows, :]


@pytest.fixture(scope="module")
def turned() -> dict[str, Mixture]:
    made = {}
    for architecture in ("t5", "llama", "bert"):
        host = tiny.model(architecture, torch.float64)
        experts = tiny.experts(host, architecture)
        made[architecture] = lw.attach(host, {name: experts[name] for name in ORDER}, lw.Sum())
    return made


CASES = [(a, m) for a in ("t5", "llama", "bert") for m in (METHODS | (PROMPT if a == "llama" else {}))]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_order_of_experts_does_not_matter(
    mixed: Any, turned: dict[str, Mixture], architecture: str, method: str
) -> None:
    policy, inputs = (METHODS | PROMPT)[method], tiny.batch(architecture)
    one, other = mixed(architecture, policy), turned[architecture]
    other.policy = policy
    with torch.no_grad():
        for (name, mine), (_, theirs) in zip(one.gate_parameters(), other.gate_parameters(), strict=True):
            theirs.copy_(permuted(name, mine, one))
    with one.record() as seen_one:
        out_one = tiny.logits(one.model, inputs)
    with other.record() as seen_other:
        out_other = tiny.logits(other.model, inputs)
    assert_close(out_other, out_one, atol=1e-5, rtol=1e-5)
    assert list(seen_one.weights) == list(seen_other.weights)
    for site, g in seen_one.weights.items():
        assert_close(seen_other.weights[site], g[..., PICK], atol=5e-5, rtol=1e-5)
