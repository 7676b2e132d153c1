"""``lw.search``: LoRAHub's weights, found on examples."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.evaluation.data import Example
from loraweave.mixture import Mixture
from loraweave.text import encode_example
from loraweave.training import search as searching
from loraweave.transforms.factor_sum import check_alike, factor_sum

DATA = [{"input": a, "target": b} for a in "abc" for b in ("xyz", "z")]


def search(mixture: Mixture, data: Any = DATA, **options: Any) -> lw.SearchResult:
    settings: dict[str, Any] = {"evaluations": 9, "progress": False, "batch_size": 4}
    settings["tokenizer"] = tiny.tokenizer(mixture.model.config.is_encoder_decoder)
    return lw.search(mixture, data, **(settings | options))


def alike(architecture: str) -> dict[str, lw.Expert]:
    """Experts whose factors can be added."""
    bare, kind = tiny.model(architecture), tiny.ARCHITECTURES[architecture]
    return {name: tiny.expert(bare, kind.targets, 2, 0.5, seed=n) for n, name in enumerate(tiny.NAMES)}


def slow_loss(model: Any, architecture: str) -> float:
    """Mean cross-entropy of the answers' tokens, one example and token at a time."""
    tokenizer, losses = tiny.tokenizer(architecture == "t5"), []
    for row in DATA:
        example = Example(**row)
        encoded = encode_example(tokenizer, example, is_encoder_decoder=architecture == "t5")
        ids, labels = torch.tensor([encoded["input_ids"]]), encoded["labels"]
        if architecture == "t5":
            start = torch.tensor([[0, *labels[:-1]]])
            logits = tiny.logits(model, {"input_ids": ids, "decoder_input_ids": start})[0]
            pairs = list(enumerate(labels))
        else:
            logits = tiny.logits(model, {"input_ids": ids})[0]
            pairs = [(t - 1, token) for t, token in enumerate(labels) if token != -100]
        losses += [-float(logits[t].log_softmax(-1)[token]) for t, token in pairs]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_the_objective_is_the_papers(architecture: str) -> None:
    mixture = tiny.attached(architecture, lw.MoLE())
    result = search(mixture, start=0.3)
    assert mixture.policy == lw.Sum(0.0, result.weights)
    assert len(result.history) == 9
    assert result.history[0]["weights"] == [0.3] * 3
    best = min(result.history, key=lambda entry: entry["objective"])
    assert list(result.weights.values()) == best["weights"]
    assert (result.objective, result.loss) == (best["objective"], best["loss"])
    assert all(abs(w) <= 1.5 for entry in result.history for w in entry["weights"])
    assert len({tuple(entry["weights"]) for entry in result.history}) == 9
    bare = tiny.model(architecture)
    experts = tiny.experts(bare, architecture)
    told: dict[str, Any] = {}
    slow = tiny.slow_mixture(bare, experts, lambda path: told["g"])
    for entry in result.history[:3]:
        told["g"] = torch.tensor(entry["weights"]).view(1, 1, 3)
        loss = slow_loss(slow, architecture)
        assert_close(entry["loss"], loss, atol=1e-4, rtol=1e-4)
        assert_close(entry["objective"], loss + 0.05 * sum(map(abs, entry["weights"])) / 3, atol=1e-4, rtol=1e-4)


def test_it_finds_the_expert_that_knows(tmp_path: Path) -> None:
    """The data is what the model says with one expert: its weight goes up, the others' stay small."""
    import lessons

    rows = lessons.lesson("llama", count=16, teacher="ant")
    tokenizer = tiny.tokenizer(False)
    data = [
        {
            "input": tokenizer.decode(row["input_ids"][:6]),
            "target": tokenizer.decode([t for t in row["labels"] if t != -100]),
        }
        for row in rows
    ]
    mixture = lessons.mixture("llama", lw.LoRAHub())
    result = search(mixture, data, evaluations=60, batch_size=16, seed=1)
    assert result.objective < result.history[0]["objective"] - 0.05
    inputs = tiny.batch("llama")
    expected = tiny.logits(mixture.model, inputs)
    mixture.fold()
    assert_close(tiny.logits(mixture.model, inputs), expected, atol=1e-5, rtol=1e-5)
    mixture.unfold()
    place = mixture.save_pretrained(tmp_path / "found", copy_experts=True)
    mixture.detach()
    lw.load(place, mixture.model)
    assert torch.equal(tiny.logits(mixture.model, inputs), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_strategy_goes_where_the_objective_is_low(seed: int) -> None:
    """A bowl whose bottom is known; not just the best of many draws, but all of the last come near it."""
    bottom = torch.tensor([0.9, -0.6, 0.3])
    searcher = searching._searcher(lw.LoRAHub(), len(bottom), seed)
    away = []
    for _ in range(120):
        away.append(float((torch.tensor(searcher.ask()) - bottom).square().sum()))
        searcher.tell(away[-1])
    assert away[0] == pytest.approx(float(bottom.square().sum())), "the start comes first"
    assert sum(away[-20:]) / 20 < 0.1 * away[0]


def test_the_seed_decides() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    runs = [search(mixture, evaluations=5, seed=seed, examples=2).history for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0]["loss"] != runs[2][0]["loss"], "other examples"


def test_a_single_expert_is_scaled() -> None:
    host = tiny.model("llama")
    mixture = lw.attach(host, {"ant": tiny.experts(host, "llama")["ant"]}, lw.Sum())
    result = search(mixture, evaluations=8)
    assert list(result.weights) == ["ant"]
    assert isinstance(mixture.policy, lw.Sum)


# ---------------------------------------------------------------- factors


@pytest.mark.parametrize("architecture", ["t5", "gpt2"])
def test_factors_are_added_as_published(architecture: str) -> None:
    experts, inputs = alike(architecture), tiny.batch(architecture)
    host = tiny.model(architecture)
    mixture = lw.attach(host, experts, lw.Linear())
    before = tiny.logits(host, inputs)
    result = search(mixture, space="factors", evaluations=6)
    assert mixture.policy == lw.Linear()
    assert torch.equal(tiny.logits(host, inputs), before)
    assert result.expert is not None
    for path, f in result.expert.factors.items():
        pairs = [(w, experts[name].factors[path]) for name, w in result.weights.items()]
        assert_close(f.A, sum(w * e.A for w, e in pairs), atol=1e-6, rtol=1e-5)
        assert_close(f.B, sum(w * e.B for w, e in pairs), atol=1e-6, rtol=1e-5)
        assert f.scale == 0.5
    mixture.detach()
    lw.attach(host, {"lorahub": result.expert}, lw.Sum())
    again = search_loss(host, architecture)
    assert_close(again, result.loss, atol=1e-5, rtol=1e-5)


def search_loss(model: Any, architecture: str) -> float:
    return slow_loss(model, architecture)


def test_factors_have_cross_terms() -> None:
    mixture = lw.attach(tiny.model("llama"), alike("llama"), lw.Sum())
    weights = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    one = factor_sum(mixture.layers, weights, "one")
    path, layer = next(iter(mixture.layers.items()))
    f = one.factors[path]
    assert (f.scale * f.B @ f.A - layer.bank.delta(weights).float()).abs().max() > 1e-3


def test_unequal_factors_are_refused() -> None:
    mixture = tiny.attached("llama", lw.Linear())
    with pytest.raises(lw.LoraweaveError, match=r"same rank and scale.*'ant' has rank 2 .* 'bee' has rank 3.*delta"):
        search(mixture, space="factors")
    assert mixture.policy == lw.Linear()
    with pytest.raises(lw.LoraweaveError, match="rank"):
        check_alike(mixture.layers, mixture.experts)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "lorahub evaluations: expected a whole number of at least 1, got 0"),
        ({"space": "deltas"}, "unknown lorahub space 'deltas'; did you mean 'delta'"),
        ({"optimizer": "cma"}, "unknown lorahub optimizer 'cma'; did you mean 'cmaes'"),
        ({"bound": 0}, "lorahub bound"),
        ({"l1": -0.1}, "lorahub l1"),
        ({"start": 2.0}, r"lorahub start: expected a weight within ±1.5 \(bound\), got 2.0"),
        ({"examples": 0}, "lorahub examples"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"data": []}, "the data is empty"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    mixture = tiny.attached("llama", lw.Sum(0.5))
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        search(mixture, **options)
    assert "\n" not in str(error.value)
    assert mixture.policy == lw.Sum(0.5)


def test_masks_and_folding_are_refused() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    with mixture.only("ant", "cat"), pytest.raises(lw.LoraweaveError, match=r"experts are masked \(kept: ant, cat\)"):
        search(mixture)
    mixture.fold()
    with pytest.raises(lw.LoraweaveError, match=r"folded.*unfold\(\) first"):
        search(mixture)
    assert mixture.folded


def test_an_interrupted_search_leaves_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = tiny.attached("llama", lw.Linear())
    calls = []

    def interrupted(*_: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(searching, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(mixture)
    assert mixture.policy == lw.Linear()


def test_losses_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = tiny.attached("llama", lw.Linear())
    losses = iter([float("nan"), 2.0, float("nan"), 1.5, float("inf"), 3.0, float("nan"), float("nan"), float("nan")])
    monkeypatch.setattr(searching, "mean_loss", lambda *_: next(losses))
    assert search(mixture).loss == 1.5
    monkeypatch.setattr(searching, "mean_loss", lambda *_: float("nan"))
    with pytest.raises(lw.LoraweaveError, match="not finite for any weighting"):
        search(mixture)


@pytest.mark.parametrize(("optimizer", "package"), [("cmaes", "cmaes"), ("ngopt", "nevergrad")])
def test_a_missing_package_is_named(optimizer: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(lw.LoraweaveError, match=rf"needs the package '{package}': pip install 'loraweave\["):
        search(tiny.attached("llama", lw.Sum()), optimizer=optimizer)


def test_the_published_optimiser() -> None:
    pytest.importorskip("nevergrad")
    result = search(tiny.attached("llama", lw.Sum()), optimizer="ngopt", evaluations=6)
    assert len(result.history) == 6
    assert result.history[0]["weights"] == [0.0] * 3
    assert len({tuple(entry["weights"]) for entry in result.history}) == 6
    assert all(abs(w) <= 1.5 for entry in result.history for w in entry["weights"])
