"""Invariant 5: gradients reach gate parameters and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing import numerics
from loraweave.mixture import Mixture
from loraweave.training import objective
from methods import CONSTANT, GATED, PROMPT, ROUTED, STATIC

LEARNED = GATED | STATIC
UNLEARNED = CONSTANT | ROUTED

CASES = [(a, m) for a in ("t5", "llama", "bert") for m in LEARNED] + [("llama", m) for m in PROMPT]


def loss_of(mixture: Mixture, architecture: str) -> Tensor:
    inputs = tiny.batch(architecture)
    if architecture == "t5":
        inputs["labels"] = inputs.pop("decoder_input_ids")
    else:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"][:, 0] = -100  # the prompt of a `prompt` gate
    loss: Tensor = mixture.model(**inputs).loss
    return loss


def balance_of(mixture: Mixture) -> Tensor:
    return objective.balance([site for site in mixture.sites if site.gate is not None])


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_only_gates_learn(mixed: Any, architecture: str, method: str) -> None:
    mixture = mixed(architecture, (LEARNED | PROMPT)[method])
    gates = {name: p for name, p in mixture.gate_parameters() if p.requires_grad}
    own = {id(p) for p in gates.values()}
    assert {id(p) for p in mixture.model.parameters() if p.requires_grad} == own
    frozen = [t for t in (*mixture.model.parameters(), *mixture.model.buffers()) if id(t) not in own]
    copies = [t.clone() for t in frozen]
    before = {name: p.clone() for name, p in gates.items()}
    optimizer = torch.optim.AdamW(gates.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(mixture, architecture) + 0.1 * balance_of(mixture)).backward()
        optimizer.step()
    for name, p in gates.items():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0 or name.endswith("/columns"), f"{name} gets no gradient"
        assert not torch.equal(p, before[name]) or name.endswith("/columns"), name
    assert all(t.grad is None for t in frozen)
    assert all(torch.equal(t, copy) for t, copy in zip(frozen, copies, strict=True))


@pytest.mark.parametrize("method", UNLEARNED)
def test_policies_without_gates_learn_nothing(mixed: Any, method: str) -> None:
    mixture = mixed("llama", UNLEARNED[method])
    assert not list(mixture.gate_parameters())
    assert not any(p.requires_grad for p in mixture.model.parameters())
    assert not loss_of(mixture, "llama").requires_grad


@pytest.mark.parametrize("method", ["mole", "mole-matrix", "mole-network", "mole-sigmoid", "mole-outputs", "mole-mean"])
def test_balance_alone_gives_gates_a_gradient(mixed: Any, method: str) -> None:
    mixture = mixed("t5", GATED[method])
    loss_of(mixture, "t5")
    balance = balance_of(mixture)
    assert balance.detach() > 3 * torch.log(torch.tensor(3.0)) + 1e-4
    balance.backward()
    assert all(p.grad.abs().max() > 0 for name, p in mixture.gate_parameters() if name.endswith("/e"))
    for _, p in mixture.gate_parameters():
        p.grad = None


@pytest.mark.parametrize("granularity", ["matrix", "block", "network"])
def test_balance_is_smallest_and_flat_at_the_uniform_gate(hosts: Any, granularity: Any) -> None:
    mixture = hosts("t5")
    mixture.policy = lw.MoLE(granularity)
    loss_of(mixture, "t5")
    balance = balance_of(mixture)
    assert_close(balance, 3 * torch.log(torch.tensor(3.0)))
    balance.backward()
    assert all(p.grad.abs().max() < 1e-6 for name, p in mixture.gate_parameters() if name.endswith("/e"))
    mixture.policy = lw.Sum()


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=9))
def test_balance_loss_of_any_shares(raw: list[float]) -> None:
    shares = torch.tensor(raw, dtype=torch.float64)
    shares = shares / shares.sum()
    value, n = numerics.balance_loss(shares), len(raw)
    assert_close(value, -torch.log(shares.prod()))
    assert value >= n * torch.log(torch.tensor(float(n), dtype=torch.float64)) - 1e-9


def test_balance_is_the_papers_equation(mixed: Any) -> None:
    """Eq. 14-15, over sites of both stacks: q_i is the mean over the sites of each site's mean."""
    mixture = mixed("t5", lw.MoLE())
    with mixture.record() as seen:
        loss_of(mixture, "t5")
    mask = tiny.batch("t5")["attention_mask"].double()
    means = []
    for g in seen.weights.values():
        p = g.double()
        weigh = mask.unsqueeze(-1) if p.shape[1] == mask.shape[1] else torch.ones_like(p[..., :1])
        means.append((p * weigh).sum((0, 1)) / weigh.expand_as(p[..., :1]).sum())
    q = torch.stack(means).mean(0)
    assert_close(balance_of(mixture).double(), -torch.log(q.prod()), atol=1e-5, rtol=1e-5)
    assert_close(q.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)
