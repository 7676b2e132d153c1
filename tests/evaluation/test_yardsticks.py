"""Yardsticks: LoRAs that stand in for the experts in a comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.evaluation.data import Example
from loraweave.evaluation.yardsticks import BestSingle, FreshLoRA, Merged, RandomLoRAs, Setting
from loraweave.training.search import mean_loss

ROWS = [Example(a, b) for a in "abc" for b in ("xyz", "z")]


def setting(architecture: str = "llama", seed: int = 0, **options: Any) -> Setting:
    model = tiny.model(architecture)
    tokenizer = tiny.tokenizer(architecture == "t5")
    return Setting(model, tokenizer, tiny.experts(model, architecture), ROWS, options, seed)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_a_fresh_lora_learns_the_examples(architecture: str) -> None:
    given = setting(architecture, steps=12, batch_size=6)
    model, inputs = given.model, tiny.batch(architecture)
    bare, flags = tiny.logits(model, inputs), [p.requires_grad for p in model.parameters()]
    before = mean_loss(model, given.batches(6))
    experts, policy = FreshLoRA(learning_rate=2e-2).stand_ins(given)
    assert torch.equal(tiny.logits(model, inputs), bare)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m.training for m in model.modules())
    fresh = experts["fresh"]
    assert set(fresh.factors) == {path for e in given.experts.values() for path in e.factors}
    assert {(f.rank, f.scale) for f in fresh.factors.values()} == {(3, 2.0)}
    lw.attach(model, experts, policy)
    assert mean_loss(model, given.batches(6)) < 0.9 * before


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    """Three batches of two are one of six, to the learned numbers and to the examples that count as seen."""

    def learned(**options: int) -> tuple[dict[str, torch.Tensor], int]:
        given = setting(steps=4, **options)
        factors = FreshLoRA(learning_rate=1e-2).stand_ins(given)[0]["fresh"].factors
        return {path: f.B @ f.A for path, f in factors.items()}, given.taught().examples_seen

    whole, seen = learned(batch_size=6)
    parts, seen_in_parts = learned(batch_size=2, gradient_accumulation_steps=3)
    small, seen_of_small = learned(batch_size=2)
    assert (seen, seen_in_parts, seen_of_small) == (24, 24, 8)
    largest = max(float(delta.abs().max()) for delta in whole.values())
    apart = [max(float((a[path] - whole[path]).abs().max()) for path in whole) / largest for a in (parts, small)]
    assert apart[0] < 0.02 < 0.2 < apart[1]


def test_the_seed_decides_fresh_and_random_ones() -> None:
    for kind, options in ((FreshLoRA(rank=1), {"steps": 2, "batch_size": 2}), (RandomLoRAs(), {})):
        made = [kind.stand_ins(setting(seed=seed, **options))[0] for seed in (1, 1, 2)]
        first = [next(iter(next(iter(experts.values())).factors.values())).A for experts in made]
        assert torch.equal(first[0], first[1])
        assert not torch.equal(first[0], first[2])


def test_random_loras_have_the_experts_shapes_and_norms() -> None:
    given = setting()
    experts, policy = RandomLoRAs({"name": "mole", "scale": 1}).stand_ins(given)
    assert policy == lw.MoLE(scale=1)
    for name, expert in given.experts.items():
        assert set(experts[name].factors) == set(expert.factors)
        for path, f in expert.factors.items():
            random = experts[name].factors[path]
            assert (random.A.shape, random.B.shape, random.scale) == (f.A.shape, f.B.shape, f.scale)
            assert_close(random.A.norm(), f.A.norm())
            assert_close(random.B.norm(), f.B.norm())
            assert not torch.allclose(random.A, f.A, atol=1e-2)


def test_best_single_has_the_lowest_loss() -> None:
    given = setting()
    losses = {}
    for name, expert in given.experts.items():
        mixture = lw.attach(given.model, {name: expert}, lw.Sum())
        losses[name] = mean_loss(given.model, given.batches(24))
        mixture.detach()
    experts, policy = BestSingle().stand_ins(given)
    assert list(experts) == [min(losses, key=lambda name: losses[name])]
    assert policy == lw.Sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreshLoRA(rank=0), "fresh_lora rank: expected a whole number of at least 1"),
        (lambda: FreshLoRA(learning_rate=0), "fresh_lora learning_rate"),
        (lambda: Merged({"name": "tie"}), "unknown merging method 'tie'; did you mean 'ties'"),
        (lambda: Merged({"name": "ties", "rate": 1}), "unknown option of merging method 'ties' 'rate'"),
        (lambda: Merged(strengths=()), "merged strengths: expected at least one"),
        (lambda: RandomLoRAs({"name": "mol"}), "unknown method 'mol'; did you mean 'mole'"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(lw.LoraweaveError, match=message):
        make()


def test_merged_is_the_merge_at_the_strength_with_the_lowest_loss() -> None:
    given = setting()
    merged = lw.merge(given.experts, "ties", density=0.5)
    losses = {}
    for strength in (-1.0, 0.1, 1.0):
        mixture = lw.attach(given.model, {"merged": merged}, lw.Sum(strength))
        losses[strength] = mean_loss(given.model, given.batches(24))
        mixture.detach()
    yardstick = Merged({"name": "ties", "density": 0.5}, strengths=tuple(losses))
    experts, policy = yardstick.stand_ins(given)
    assert policy == lw.Sum(min(losses, key=lambda strength: losses[strength]))
    for path, factors in merged.factors.items():
        assert torch.equal(experts["merged"].factors[path].B, factors.B)
    with yardstick.contest(given) as ready:
        assert (ready.learned.evaluations, ready.learned.examples_seen) == (3, 3 * len(ROWS))
    with Merged(strengths=(0.3,)).contest(given) as ready:
        assert ready.learned.evaluations == 0


def test_the_seed_decides_what_dare_drops() -> None:
    path = next(iter(setting().experts["ant"].factors))

    def made(at: int, **options: Any) -> torch.Tensor:
        experts, _ = Merged({"name": "dare_linear", **options}).stand_ins(setting(seed=at))
        return experts["merged"].factors[path].B

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    assert torch.equal(made(1, seed=7), made(2, seed=7))
