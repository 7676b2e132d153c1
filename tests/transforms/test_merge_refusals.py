"""What cannot be merged is said in one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from merging import alike, dense, expert, trio
from torch.testing import assert_close

import loraweave as lw
from loraweave.transforms import Ties, registry


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("tise", {}, "unknown merging method 'tise'; did you mean 'ties'?"),
        ("ties", {"densty": 0.2}, "unknown option of merging method 'ties' 'densty'; did you mean 'density'?"),
        ("ties", {"density": 0}, "ties density: expected a share above 0 and at most 1, got 0"),
        ("ties", {"density": 1.1}, "expected a share above 0 and at most 1, got 1.1"),
        ("ties", {"density": math.nan}, "expected a share"),
        ("dare_ties", {"density": "half"}, "expected a share above 0 and at most 1, got 'half'"),
        ("dare_linear", {"density": True}, "expected a share"),
        ("dare_linear", {"seed": 1.5}, "dare_linear seed: expected a whole number, got 1.5"),
        ("svd", {"rank": 0}, "svd rank: expected a whole number of at least 1, got 0"),
        ("svd", {"rank": 2.0}, "svd rank: expected a whole number of at least 1, got 2.0"),
        ("magnitude_prune", {"rank": True}, "expected a whole number"),
        ("ties", {"space": "deltas"}, "unknown ties space 'deltas'; did you mean 'delta'?"),
        ("ties", {"space": ["delta"]}, "unknown ties space"),
        ("ties", {"space": "factors", "rank": 2}, "ties rank: space='factors' keeps the experts' own rank"),
        ("linear", {"negate": "two"}, "unknown linear negate 'two'"),
        ("knots", {"then": "knots"}, "unknown knots then 'knots'"),
        ("knots", {"density": -1}, "knots density: expected a share"),
        ("core_space", {"then": "linear", "density": 0.5}, "then='linear' keeps everything; leave density out"),
        ("linear", {"space": "factors"}, "needs equal ranks, but at 'block.q' they are ant 2, bee 3, cat 1"),
        ("dare_ties", {"space": "factors"}, "use space='delta', which takes any"),
    ],
)
def test_methods_and_options(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(lw.LoraweaveError) as caught:
        lw.merge(trio(), method, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"anx": 1.0}, "unknown expert 'anx'; did you mean 'ant'?"),
        ({"ant": math.inf}, "merge weight of 'ant': expected a finite number, got inf"),
        ({"ant": "1"}, "merge weight of 'ant': expected a finite number, got '1'"),
        (math.nan, "merge weights: expected a finite number, got nan"),
        ([1.0, 2.0, 3.0], "merge weights: expected a finite number, got [1.0, 2.0, 3.0]"),
        (0, "every expert has weight 0, so there is nothing to merge"),
    ],
)
def test_weights(weights: Any, said: str) -> None:
    with pytest.raises(lw.LoraweaveError) as caught:
        lw.merge(trio(), "concat", weights=weights)
    assert said in str(caught.value)


def test_experts_of_different_models() -> None:
    other = lw.Expert("other", {"head": lw.LoraFactors(torch.ones(1, 4), torch.ones(8, 1), 1.0)})
    with pytest.raises(lw.LoraweaveError, match="expert 'other': 'head' maps 4 to 8 features, but in expert 'ant' it"):
        lw.merge([alike()["ant"], other], "concat")
    f = alike()["ant"].factors["head"]
    looked_up = lw.Expert("looked", {"head": dataclasses.replace(f, embedding=True)})
    with pytest.raises(lw.LoraweaveError, match="maps 4 to 9 entries of an embedding, but in"):
        lw.merge([alike()["ant"], looked_up], "concat")


def test_bases() -> None:
    one, two, three = alike().values()
    here = dataclasses.replace(one, base="a/base"), dataclasses.replace(two, base="a/base"), three
    assert lw.merge(here, "concat").base == "a/base"
    there = dataclasses.replace(three, base="other/base")
    with pytest.warns(lw.LoraweaveWarning, match=r"'a/base' \(bee\), 'other/base' \(cat\); the result names none"):
        assert lw.merge([*here[:2], there], "concat").base is None
    assert lw.merge([*here[:2], there], "concat", weights={"cat": 0}).base == "a/base"


def test_a_transform_instead_of_a_name() -> None:
    experts = trio()
    by_name = lw.merge(experts, "ties", density=0.4, rank=2, name="both")
    assert by_name.name == "both"
    assert_close(dense(lw.merge(experts, Ties(0.4, rank=2)), "block.q"), dense(by_name, "block.q"))
    with pytest.raises(lw.LoraweaveError, match=r"options \(density\) go with a method's name"):
        lw.merge(experts, Ties(), density=0.5)


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(lw.LoraweaveError, match="two merging methods are called 'ties'"):
        registry.register(Ties)


def test_experts_are_left_as_they_were() -> None:
    experts = {"a": expert("a", {"head": 2}, dtype=torch.float32), "b": expert("b", {"head": 2}, seed=1)}
    before = [f.A.clone() for e in experts.values() for f in e.factors.values()]
    for method in registry.names():
        merged = lw.merge(experts, method)
        merged.factors["head"].A.zero_()
    assert all(torch.equal(x, e.factors["head"].A) for x, e in zip(before, experts.values(), strict=True))
