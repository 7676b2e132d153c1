"""CAT, LoRA-Flow, Arrow and LoGo against loops written from their papers' equations, and Arrow against peft."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from loraweave.policies.arrow import direction

Factors = list[lw.LoraFactors | None]
# Weights of one site, [rows, tokens or 1, E]: from its gate, the leader's experts, the leader's input, the real tokens
# of each row, and the experts kept.
Oracle = Callable[[Any, Factors, Tensor, list[list[int]], list[int]], Tensor]
KEPT = [[0, 1, 2], [0, 2], [1]]


@pytest.fixture(scope="module")
def hosts() -> dict[str, tuple[Mixture, dict[str, lw.Expert]]]:
    made = {}
    for architecture in ("t5", "llama", "bert"):
        bare = tiny.model(architecture, torch.float64)
        experts = tiny.experts(bare, architecture)
        made[architecture] = (lw.attach(bare, experts, lw.Sum()), experts)
    return made


def check(host: Any, architecture: str, policy: Any, oracle: Oracle, kept: list[int], side: str = "right") -> None:
    """Every site's weights equal the oracle's."""
    mixture, experts = host
    mixture.policy = policy
    tiny.randomize(mixture)
    inputs = tiny.batch(architecture, side=side)
    mask = inputs["attention_mask"].bool()
    read: dict[str, Tensor] = {}
    hooks = [
        site.leader.base.register_forward_hook(
            lambda _, args, out, name=site.name: read.__setitem__(name, args[0].clone())
        )
        for site in mixture.sites
    ]
    with mixture.only(*(tiny.NAMES[i] for i in kept)), mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    for hook in hooks:
        hook.remove()
    assert len(mixture.sites) >= 1
    for site in mixture.sites:
        x = read[site.name]
        decoder = site.plan.stream == "decoder"
        real = [[t for t in range(x.shape[1]) if decoder or mask[row, t]] for row in range(x.shape[0])]
        if decoder and isinstance(policy, lw.LoGo):  # no prompt: each token is read by itself
            x = x.reshape(-1, 1, x.shape[-1])
            real = [[0]] * len(x)
        factors = [expert.factors.get(site.plan.members[0]) for expert in experts.values()]
        expected = oracle(site.gate, factors, x, real, kept)
        got = seen.weights[site.name].double().reshape(-1, *seen.weights[site.name].shape[-1:])
        expected = expected.reshape(-1, expected.shape[-1])
        got = got.expand(len(expected), -1) if len(got) == 1 else got  # where nothing could be read, all rows are alike
        if len(got) == mask.numel():  # what padding does is of no interest
            got, expected = got[mask.flatten()], expected[mask.flatten()]
        assert_close(got, expected, atol=2e-5, rtol=2e-5, msg=lambda m, n=site.name: f"{n}: {m}")


def output(f: lw.LoraFactors, x: Tensor) -> Tensor:
    """``s B A x``."""
    return f.scale * (f.B.double() @ (f.A.double() @ x.double()))


# ---------------------------------------------------------------- the equations


def cat_weights(gate: Any, factors: Factors, x: Tensor, real: Any, kept: list[int]) -> Tensor:
    return torch.tensor([[[float(gate.w.detach()[i]) if i in kept else 0.0 for i in range(3)]]], dtype=torch.float64)


def shared_cat_weights(gate: Any, factors: Factors, x: Tensor, real: Any, kept: list[int]) -> Tensor:
    """As the released code has it: the softmax of what is learned."""
    exponentials = [math.exp(float(gate.w.detach()[i])) if i in kept else 0.0 for i in range(3)]
    return torch.tensor([[[e / sum(exponentials) for e in exponentials]]], dtype=torch.float64)


def flow_weights(gate: Any, factors: Factors, x: Tensor, real: Any, kept: list[int]) -> Tensor:
    """``softmax(W x_t) + b``, among the experts kept."""
    W, b = gate.W.detach().double(), gate.b.detach().double()
    g = torch.zeros(*x.shape[:2], 3, dtype=torch.float64)
    for row, t in [(row, t) for row in range(x.shape[0]) for t in range(x.shape[1])]:
        exponentials = {i: math.exp(float(W[i] @ x[row, t].double())) for i in kept}
        for i in kept:
            g[row, t, i] = exponentials[i] / sum(exponentials.values()) + b[i]
    return g


def arrow_weights(k: int, temperature: float) -> Oracle:
    def weights(gate: Any, factors: Factors, x: Tensor, real: Any, kept: list[int]) -> Tensor:
        present = [i for i in kept if factors[i] is not None]
        prototypes = {}
        for i in present:
            f = factors[i]
            assert f is not None
            prototypes[i] = torch.linalg.svd(f.B.double() @ f.A.double()).Vh[0]
        g = torch.zeros(*x.shape[:2], 3, dtype=torch.float64)
        for row, t in [(row, t) for row in range(x.shape[0]) for t in range(x.shape[1])]:
            sim = {i: abs(float(prototypes[i] @ x[row, t].double())) for i in present}
            best = sorted(present, key=lambda i: -sim[i])[:k]
            for i in best:
                g[row, t, i] = math.exp(sim[i] / temperature) / sum(math.exp(sim[j] / temperature) for j in best)
        return g

    return weights


def logo_weights(signal: str, k: int, pooling: str) -> Oracle:
    def weights(gate: Any, factors: Factors, x: Tensor, real: list[list[int]], kept: list[int]) -> Tensor:
        rows = []
        for row, tokens in enumerate(real):
            read = x[row, tokens[-1]] if pooling == "last" else x[row, tokens].mean(0)
            s = torch.zeros(3, dtype=torch.float64)
            for i in kept:
                f = factors[i]
                if f is None:
                    continue
                o = output(f, read)
                p = torch.exp(o) / torch.exp(o).sum()
                s[i] = o.norm() if signal == "norm" else 1 / -(p * p.log()).sum()
            chosen = sorted(kept, key=lambda i: -float(s[i]))[:k]
            g = torch.zeros(3, dtype=torch.float64)
            for i in chosen:
                g[i] = s[i] / s[chosen].sum() if s.sum() > 0 else 1 / len(kept)
            rows.append(g)
        return torch.stack(rows).unsqueeze(1)

    return weights


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("architecture", ["t5", "llama", "bert"])
def test_weights_are_the_papers(hosts: Any, architecture: str, kept: list[int]) -> None:
    host = hosts[architecture]
    check(host, architecture, lw.CAT(), cat_weights, kept)
    check(host, architecture, lw.CAT(softmax=True), shared_cat_weights, kept)
    check(host, architecture, lw.LoRAFlow(), flow_weights, kept)
    check(host, architecture, lw.LoRAFlow("matrix"), flow_weights, kept)
    for k, temperature in ((1, 1.0), (2, 0.3), (3, 2.0)):
        check(host, architecture, lw.Arrow(k, temperature), arrow_weights(k, temperature), kept)
    sides = ("right", "left") if architecture == "llama" else ("right",)
    for side in sides:
        for signal, k, pooling in (("norm", 3, "last"), ("norm", 1, "mean"), ("entropy", 2, "last")):
            for granularity in ("network", "matrix"):
                policy = lw.LoGo(signal, k, pooling, granularity)  # type: ignore[arg-type]
                check(host, architecture, policy, logo_weights(signal, k, pooling), kept, side)


def test_untrained_gates_are_the_average(hosts: Any) -> None:
    mixture, _ = hosts["t5"]
    inputs = tiny.batch("t5")
    mixture.policy = lw.Linear()
    expected = tiny.logits(mixture.model, inputs)
    for policy in (lw.CAT(), lw.LoRAFlow(), lw.CAT(granularity="network"), lw.CAT(softmax=True)):
        mixture.policy = policy
        assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-6, rtol=1e-6)
    mixture.policy = lw.CAT(start=1.0)
    learned = tiny.logits(mixture.model, inputs)
    mixture.policy = lw.Sum()
    assert_close(tiny.logits(mixture.model, inputs), learned, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- Arrow's directions


def test_direction_is_the_top_right_singular_vector() -> None:
    generator = torch.Generator().manual_seed(3)
    for rank, scale in ((1, 1.0), (4, 0.01), (5, 300.0)):
        A = torch.randn(rank, 12, generator=generator, dtype=torch.float64)
        B = scale * torch.randn(9, rank, generator=generator, dtype=torch.float64)
        v = A.T @ direction(lw.LoraFactors(A, B, 0.5)).double()
        top = torch.linalg.svd(B @ A).Vh[0]
        assert_close(v * torch.sign(v @ top), top, atol=1e-5, rtol=1e-5)
        kernels = lw.LoraFactors(A.view(rank, 3, 2, 2), B, 0.5)  # of a convolution: x is what a kernel sees
        assert torch.equal(direction(kernels), direction(lw.LoraFactors(A, B, 0.5)))
    repeated = torch.cat([A[:1], A[:1]])  # linearly dependent rows
    v = repeated.T @ direction(lw.LoraFactors(repeated, B[:, :2], 1.0)).double()
    assert_close(v.abs(), (A[0] / A[0].norm()).abs(), atol=1e-5, rtol=1e-5)


def test_an_expert_that_does_nothing_points_nowhere() -> None:
    f = lw.LoraFactors(torch.ones(2, 4), torch.zeros(3, 2), 1.0)
    assert torch.equal(direction(f), torch.zeros(2))
    broken = lw.LoraFactors(torch.full((2, 4), float("nan")), torch.ones(3, 2), 1.0)
    with pytest.raises(lw.LoraweaveError, match="not finite"):
        direction(broken)


def test_arrow_is_pefts(tmp_path: Path) -> None:
    """Peft finds the vectors by 15 steps of power iteration: exact where the experts have rank 1."""
    inputs = tiny.batch("llama")
    folders = []
    for number in range(3):
        bare = tiny.model("llama")
        expert = tiny.expert(bare, ("q_proj", "v_proj", "down_proj"), 1, 0.5 + number, seed=number)
        folders.append(str(lw.write_expert(expert, tmp_path / f"e{number}")))
    for k, temperature in ((2, 1.0), (3, 0.4)):
        config = peft.ArrowConfig(top_k=k, router_temperature=temperature)
        theirs = peft.create_arrow_model(tiny.model("llama"), folders, config).eval()
        host = tiny.model("llama")
        ours = lw.attach(host, folders, lw.Arrow(k, temperature))
        assert_close(tiny.logits(host, inputs), tiny.logits(theirs, inputs), atol=2e-5, rtol=1e-5)
        ours.detach()


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.CAT(granularity="blok"), r"unknown cat granularity 'blok'; did you mean 'block'\?"),  # type: ignore[arg-type]
        (lambda: lw.CAT(start=float("nan")), "cat start: expected a finite number, got nan"),
        (lambda: lw.CAT(balance=-1), "cat balance"),
        (lambda: lw.CAT(start=0.5, softmax=True), "with softmax every weight starts at 1/N"),
        (lambda: lw.LoRAFlow(granularity="layers"), "did you mean 'layer'"),  # type: ignore[arg-type]
        (lambda: lw.LoRAFlow(balance=float("inf")), "lora_flow balance"),
        (lambda: lw.Arrow(k=0), "arrow k: expected a whole number of at least 1, got 0"),
        (lambda: lw.Arrow(k=True), "arrow k"),
        (lambda: lw.Arrow(temperature=0), "arrow temperature: expected a finite number larger than 0, got 0"),
        (lambda: lw.LoGo(signal="norms"), "unknown logo signal 'norms'; did you mean 'norm'"),  # type: ignore[arg-type]
        (lambda: lw.LoGo(pooling="token"), r"unknown logo pooling 'token' \(known: last, mean\)"),  # type: ignore[arg-type]
        (lambda: lw.LoGo(k=1.5), "logo k"),  # type: ignore[arg-type]
        (lambda: lw.LoGo(granularity="net"), "unknown logo granularity"),  # type: ignore[arg-type]
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", [lw.CAT(), lw.LoRAFlow(), lw.Arrow(), lw.LoGo()], ids=lambda p: p.name)
def test_gates_stay_in_single_precision(policy: Any) -> None:
    mixture = tiny.randomize(tiny.attached("llama", policy))
    inputs = tiny.batch("llama")
    expected = tiny.logits(mixture.model, inputs)
    mixture.model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for _, p in mixture.gate_parameters())
    assert all(t.dtype != torch.bfloat16 for gate in mixture.gates.values() for t in gate.buffers())
    with mixture.only("ant", "bee"):
        tiny.logits(mixture.model, inputs)
    got = tiny.logits(mixture.model, inputs).float()
    assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_trained_cat_folds_and_exports(tmp_path: Path) -> None:
    mixture = tiny.attached("llama", lw.CAT())
    data = [{"input": a, "target": b} for a in "abc" for b in ("xy", "zz")]
    start = {name: p.detach().clone() for name, p in mixture.gate_parameters()}
    settings: dict[str, Any] = {"tokenizer": tiny.tokenizer(False), "progress": False, "use_cpu": True}
    result = lw.train(mixture, data, steps=8, batch_size=6, learning_rate=0.1, **settings)
    assert result.history[-2]["loss"] < result.history[0]["loss"]
    assert any(not torch.equal(p, start[name]) for name, p in mixture.gate_parameters())
    inputs = tiny.batch("llama")
    expected = tiny.logits(mixture.model, inputs)
    folder = mixture.export_lora(tmp_path / "one")
    mixture.fold()
    assert mixture.folded
    assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(lw.LoraweaveError, match=r"folded into the weights; call unfold\(\) first"):
        lw.train(mixture, data, steps=1, **settings)
    plain = peft.PeftModel.from_pretrained(tiny.model("llama"), folder).eval()
    assert_close(tiny.logits(plain, inputs), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [lw.Arrow(), lw.LoGo()], ids=lambda p: p.name)
def test_routers_have_nothing_to_train(policy: Any) -> None:
    mixture = tiny.attached("llama", policy)
    with pytest.raises(lw.LoraweaveError, match=f"nothing to train: a '{policy.name}' policy has no gates that learn"):
        lw.train(mixture, [{"input": "a", "target": "b"}], tokenizer=tiny.tokenizer(False), progress=False)
