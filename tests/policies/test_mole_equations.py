"""Every form of the MoLE gate against the paper's equations, evaluated literally."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from equations import full_parameters, gate_weights
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from loraweave.policies.mole_evidence import RankReader, symmetric_root


@cache
def host(architecture: str) -> tuple[Mixture, dict[str, lw.Expert]]:
    bare = tiny.model(architecture, torch.float64)
    experts = tiny.experts(bare, architecture)
    # Embeddings too: their experts' outputs are looked up.
    names = {"t5": "encoder.embed_tokens", "llama": "embed_tokens"}
    for name, seed in (("bee", 8), ("cat", 9)):
        more = tiny.expert(bare, [names[architecture]], 2, 0.4, seed=seed).factors
        experts[name] = dataclasses.replace(experts[name], factors={**experts[name].factors, **more})
    return lw.attach(bare, experts, lw.Sum()), experts


def check(architecture: str, policy: lw.MoLE, kept: tuple[int, ...] = (0, 1, 2), labelled: bool = False) -> None:
    mixture, experts = host(architecture)
    mixture.policy = policy
    tiny.randomize(mixture)
    inputs = tiny.batch(architecture)
    mask = inputs["attention_mask"].bool()
    if labelled:
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :2] = -100
        inputs["labels"][~mask] = -100
    seen_by: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        site.leader.base.register_forward_hook(
            lambda _, args, out, name=site.name: seen_by.__setitem__(name, (args[0].clone(), out.clone()))
        )
        for site in mixture.sites
    ]
    with mixture.only(*(tiny.NAMES[i] for i in kept)), mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    for hook in hooks:
        hook.remove()
    for site in mixture.sites:
        factors = [expert.factors.get(site.plan.members[0]) for expert in experts.values()]
        x, y = seen_by[site.name]
        causal = site.plan.stream in ("decoder", "model")
        pooling = {"auto": "token" if causal else "mean"}.get(policy.pooling, policy.pooling)
        pooled = mask if site.plan.stream != "decoder" else torch.ones(x.shape[:2], dtype=torch.bool)
        if pooling == "prompt" and labelled:
            pooled = mask & (torch.arange(mask.shape[1]) < 2)
        hidden = y if site.plan.bank.embedding else x
        expected = gate_weights(site.gate, factors, x, hidden, site.plan.features[1], pooled, pooling, kept)
        got = seen.weights[site.name].double()
        if pooling == "token":  # what padding does is of no interest
            got, expected = got * pooled.unsqueeze(-1), expected * pooled.unsqueeze(-1)
        assert_close(got, expected, atol=2e-5, rtol=2e-5, msg=lambda m, n=site.name: f"{n}: {m}")


NORMALIZATIONS = ("l2", "rms", "layer")
FORMS = [("outputs", "compact"), ("outputs", "full"), ("hidden", "compact")]


@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("evidence", "form"), FORMS)
def test_evidence_and_normalisation(architecture: str, normalization: Any, evidence: Any, form: Any) -> None:
    granularity = {"l2": "matrix", "rms": "layer", "layer": "block"}[normalization]
    check(architecture, lw.MoLE(granularity, evidence, normalization=normalization, gate_form=form))  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["mean", "prompt", "token", "flatten"])
@pytest.mark.parametrize(("evidence", "form"), FORMS)
def test_pooling(pooling: Any, evidence: Any, form: Any) -> None:
    for normalization in NORMALIZATIONS:
        policy = lw.MoLE("block", evidence, pooling, normalization, form, max_length=9)
        check("llama", policy)
        if pooling == "prompt":
            check("llama", policy, labelled=True)


def test_pooling_in_an_encoder_decoder() -> None:
    for granularity, pooling in itertools.product(("block", "network"), ("mean", "token", "flatten")):
        check("t5", lw.MoLE(granularity, evidence="outputs", pooling=pooling, max_length=8))  # type: ignore[arg-type]


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "softmax": {"scale": 1.0},
    "softmax n": {"scale": "experts"},
    "softmax scaled": {"scale": 2.2, "temperature": 0.4},
    "softmax learned": {"scale": 1.3, "learn_scale": True, "learn_temperature": False},
    "top1": {"activation": "top1"},
    "top2": {"activation": "topk", "k": 2, "scale": 1.0},
    "top2 scaled": {"activation": "topk", "k": 2, "scale": 2.0},
    "top5 of 3": {"activation": "topk", "k": 5, "scale": 1.0},
    "sigmoid": {"activation": "sigmoid"},
    "linear": {"activation": "linear"},
    "linear scaled": {"activation": "linear", "scale": 2.5, "learn_scale": True, "temperature": 0.5},
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_activation(name: str, pooling: Any) -> None:
    for kept in ((0, 1, 2), (0, 2), (1,)):
        check("llama", lw.MoLE(evidence="outputs", pooling=pooling, **ACTIVATIONS[name]), kept)


def test_compact_expresses_what_full_does() -> None:
    mixture, experts = host("llama")
    inputs = tiny.batch("llama")
    for normalization, pooling in itertools.product(NORMALIZATIONS, ("token", "flatten")):
        options: dict[str, Any] = {"normalization": normalization, "pooling": pooling, "max_length": 8}
        mixture.policy = lw.MoLE(evidence="outputs", gate_form="full", **options)
        tiny.randomize(mixture)
        full = dict(mixture.gates)
        with mixture.record() as seen:
            expected = tiny.logits(mixture.model, inputs)
        mixture.policy = lw.MoLE(evidence="outputs", gate_form="compact", **options)
        with torch.no_grad():
            for name, gate in mixture.gates.items():
                gate.e.copy_(full[name].reader.to_compact(full[name].e))
                gate.log_temperature.copy_(full[name].log_temperature)
                if gate.columns is not None:
                    gate.columns.copy_(full[name].reader.columns(full[name].e))
        with mixture.record() as again:
            got = tiny.logits(mixture.model, inputs)
        for name, g in seen.weights.items():
            assert_close(again.weights[name], g, atol=1e-4, rtol=1e-4)
        assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert experts


def test_compact_coordinates_have_the_outputs_lengths_and_angles() -> None:
    mixture, experts = host("llama")
    path = "model.layers.0.self_attn.q_proj"
    reader = RankReader(mixture.layers[path].bank, full=False)
    factors = [expert.factors[path] for expert in experts.values()]
    x = torch.randn(5, 32)
    a = torch.cat([x @ f.A.T for f in factors], -1)
    E = torch.cat([f.scale * x @ f.A.T @ f.B.T for f in factors], -1)
    measured = reader.measure(a.unsqueeze(0), total=True)
    assert_close(measured.length[0], E.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert measured.total is not None
    assert_close(measured.total[0], E.sum(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert_close(measured.coordinates[0] @ measured.coordinates[0].T, E @ E.T, atol=1e-4, rtol=1e-4)
    assert reader.size == E.shape[1]


def test_the_symmetric_root() -> None:
    for shape in ((6, 3), (3, 3), (2, 4)):
        B = torch.randn(*shape)
        root = symmetric_root(B)
        assert_close(root, root.T, atol=1e-6, rtol=0)
        assert_close(root @ root, B.T @ B, atol=1e-5, rtol=1e-5)
        assert torch.linalg.eigvalsh(root).min() > -1e-6
    turned = torch.linalg.qr(torch.randn(6, 6))[0] @ torch.randn(6, 3)
    assert_close(symmetric_root(turned) @ symmetric_root(turned), turned.T @ turned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hard", [{"activation": "top1"}, {"activation": "topk", "k": 2}])
def test_hard_choices_learn_straight_through(hard: dict[str, Any]) -> None:
    """Forward the best alone, backward the softmax over all."""
    mixture, _ = host("llama")
    inputs = tiny.batch("llama", (6,))
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    grads = []
    for policy in (lw.MoLE(granularity="network", **hard), lw.MoLE(scale=1.0, granularity="network")):
        mixture.policy = policy
        tiny.randomize(mixture)
        mixture.model(**inputs)
        site = next(s for s in mixture.sites if s.name == "model.embed_tokens")  # runs before all others
        g = site.current.dense
        if policy.activation != "softmax":
            assert ((g.detach().abs() > 1e-6).sum(-1) == hard.get("k", 1)).all()
            assert_close(g.detach().sum(-1), torch.ones(g.shape[:-1]), atol=1e-6, rtol=0)
            if policy.activation == "topk":
                with torch.no_grad():
                    mixture.model(**inputs)
                assert_close(site.current.dense, g.detach(), atol=1e-6, rtol=0)
        mixture.model.zero_grad(set_to_none=True)
        (g * values).sum().backward()
        grads.append([site.gate.e.grad.clone(), site.gate.log_temperature.grad.clone()])
    for straight, soft in zip(*grads, strict=True):
        assert_close(straight, soft, atol=1e-6, rtol=1e-5)
        assert soft.abs().max() > 0


def test_a_gradient_by_finite_differences() -> None:
    mixture, _ = host("llama")
    inputs = tiny.batch("llama")
    for policy in (
        lw.MoLE(evidence="outputs", normalization="layer"),
        lw.MoLE("network", "outputs", gate_form="full"),
        lw.MoLE(activation="sigmoid"),
        lw.MoLE(activation="linear", learn_scale=True),
    ):
        mixture.policy = policy
        tiny.randomize(mixture, strength=0.5)

        def loss() -> Tensor:
            return mixture.model(**inputs).logits.square().mean()

        mixture.model.zero_grad(set_to_none=True)
        loss().backward()
        for name, p in mixture.gate_parameters():
            if not p.requires_grad:
                continue
            direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                p.add_(direction, alpha=3e-3)
                up = loss()
                p.add_(direction, alpha=-6e-3)
                slope = (up - loss()) / 6e-3
                p.add_(direction, alpha=3e-3)
            assert_close(
                (p.grad * direction).sum().double(), slope, atol=2e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_parameters_of_each_form() -> None:
    mixture, experts = host("llama")
    path = "model.layers.0.self_attn.q_proj"
    rows = sum(expert.factors[path].rank for expert in experts.values())
    shapes: dict[tuple[int, ...], Any] = {
        (rows, 3): lw.MoLE("matrix", evidence="outputs"),
        (3, 32, 3): lw.MoLE("matrix", evidence="outputs", gate_form="full"),
        (32, 3): lw.MoLE("matrix", evidence="hidden"),
        (11, rows, 3): lw.MoLE("matrix", evidence="outputs", pooling="flatten", max_length=11),
        (11, 3, 32, 3): lw.MoLE("matrix", evidence="outputs", pooling="flatten", max_length=11, gate_form="full"),
    }
    for shape, policy in shapes.items():
        mixture.policy = policy
        gate = mixture.gates[path]
        assert tuple(gate.e.shape) == shape
        assert not gate.e.any()
        assert full_parameters(gate, [e.factors[path] for e in experts.values()], 32).shape[-1] == 3
    mixture.policy = lw.MoLE(learn_temperature=False)
    assert not any(p.requires_grad for n, p in mixture.gate_parameters() if not n.endswith(("/e", "/bias")))
    assert isinstance(next(iter(mixture.gates.values())), nn.Module)


def test_starts() -> None:
    mixture, _ = host("llama")
    inputs = tiny.batch("llama")
    starts: dict[Any, list[float]] = {
        lw.MoLE(): [1 / 3] * 3,
        lw.MoLE(scale="experts"): [1.0] * 3,
        lw.MoLE.paper(): [1 / 3] * 3,
        lw.MoLE(scale=2.0): [2 / 3] * 3,
        lw.MoLE(activation="sigmoid"): [0.98] * 3,
        lw.MoLE(activation="linear"): [1 / 3] * 3,
        lw.MoLE(activation="linear", scale="experts"): [1.0] * 3,
    }
    for policy, expected in starts.items():
        mixture.policy = policy
        with mixture.record() as seen:
            tiny.logits(mixture.model, inputs)
        for g in seen.weights.values():
            assert_close(g, torch.tensor(expected).expand_as(g), atol=1e-6, rtol=0)
