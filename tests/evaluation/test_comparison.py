"""The numbers of results.json, by hand; the bootstrap against what is known of it."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from typing import Any

import pytest

from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import paired_bootstrap
from loraweave.evaluation.cells import Cell, Cost
from loraweave.evaluation.comparison import Run, costs, largest_weights, retention, single, spread, summarise
from loraweave.evaluation.environment import environment, peak_gpu_memory_gb, peak_memory_gb
from loraweave.files import write_json_atomic

OWN = {"qa": 80.0, "nli": 50.0}


def runs() -> list[Run]:
    return [
        Run("base", {"qa": 20.0, "nli": 10.0}, seconds=1.0),
        Run("mole", {"qa": 84.0, "nli": 50.0}, seed=1, seconds=5.0),
        Run("mole", {"qa": 80.0, "nli": 45.0}, seed=0, seconds=3.0),
        Run(single("qa"), {"qa": 80.0, "nli": 0.0}),
    ]


def test_retention_is_the_mean_of_ratios() -> None:
    # Not the ratio of means, which would be 100 / 130.
    assert retention({"qa": 60.0, "nli": 40.0}, OWN) == pytest.approx((0.75 + 0.8) / 2)
    assert retention(OWN, OWN) == 1.0
    assert retention({"qa": 88.0, "nli": 55.0, "held out": 3.0}, OWN) == pytest.approx(1.1)


def cell(method: str, seed: int | None, cost: Cost, weights: dict[str, Any] | None = None) -> Cell:
    items = {"qa": [0.0] * 30, "nli": [0.0] * 10}
    return Cell(method, seed, {}, {"qa": 0.0, "nli": 0.0}, items, cost, weights=weights or {})


def test_costs_are_means_over_seeds_per_item_and_memory_is_the_largest() -> None:
    found = costs(
        [
            cell("mole", 0, Cost(10.0, 100, 2400, 4.0, 1.5, 7.0)),
            cell("mole", 1, Cost(20.0, 100, 2400, 8.0, 2.5, 6.0)),
            cell("sum", None, Cost(score_seconds=2.0)),
        ]
    )
    assert found["mole"] == {
        "train_seconds": 15.0,
        "evaluations": 100.0,
        "examples_seen": 2400.0,
        "seconds_per_item": 6.0 / 40,
        "peak_memory_gb": 2.5,
        "peak_gpu_memory_gb": 7.0,
    }
    assert found["sum"]["seconds_per_item"] == 2.0 / 40
    assert (found["sum"]["peak_memory_gb"], found["sum"]["peak_gpu_memory_gb"]) == (None, None)


def test_the_largest_weight_by_hand() -> None:
    """Means over tasks first: what stands out on one task alone does not stand out."""
    uneven = {"qa": {"a": 0.9, "b": 0.1}, "nli": {"a": 0.3, "b": 0.7}}
    negative = {"qa": {"a": -3.0, "b": 1.0}, "nli": {"a": -3.0, "b": 1.0}}
    found = largest_weights(
        [
            cell("mole", 0, Cost(), uneven),
            cell("mole", 1, Cost(), negative),
            cell("lorahub", 0, Cost(), {"qa": {"a": 0.0, "b": 0.0}}),
            cell("sum", None, Cost()),
        ]
    )
    assert found["mole"]["per_seed"] == pytest.approx([60.0, 75.0])
    assert found["lorahub"]["per_seed"] == [0.0]
    assert "sum" not in found


@pytest.mark.parametrize("own", [0.0, -1.0, math.nan, math.inf])
def test_retention_against_nothing(own: float) -> None:
    with pytest.raises(LoraweaveError, match=r"own expert of 'nli' scores"):
        retention(OWN, {"qa": 80.0, "nli": own})


def test_retention_needs_every_task() -> None:
    with pytest.raises(LoraweaveError, match=r"no score for the task 'nli' \(has: qa\)"):
        retention({"qa": 1.0}, OWN)
    with pytest.raises(LoraweaveError, match="no task"):
        retention({"qa": 1.0}, {})


def test_summary_by_hand() -> None:
    results = summarise(runs(), OWN, extra={"metrics": {"qa": "exact_match"}})
    # Seed 0: (80/80 + 45/50) / 2 = 0.95; seed 1: (84/80 + 50/50) / 2 = 1.025.
    assert results["retention"]["mole"] == {
        "mean": pytest.approx(0.9875),
        "std": pytest.approx(0.075 / math.sqrt(2)),
        "per_seed": [pytest.approx(0.95), pytest.approx(1.025)],
    }
    assert results["retention"]["base"] == {
        "mean": pytest.approx(0.225),
        "std": 0.0,
        "per_seed": [pytest.approx(0.225)],
    }
    assert results["scores"]["mole"]["qa"] == {
        "mean": 82.0,
        "std": pytest.approx(math.sqrt(8)),
        "per_seed": [80.0, 84.0],
    }
    assert list(results["scores"]) == list(results["retention"]) == ["base", "mole", "only:qa"]
    assert list(results["scores"]["base"]) == ["qa", "nli"]
    assert results["own"] == OWN
    assert results["seeds"] == [0, 1]
    assert results["seconds"] == 9.0
    assert results["seconds_per_run"]["mole"]["per_seed"] == [3.0, 5.0]
    assert results["metrics"] == {"qa": "exact_match"}
    assert results["peak_memory_gb"] > 0
    assert set(results["versions"]) == {"loraweave", "torch", "transformers", "peft", "python", "platform"}
    assert summarise(runs(), OWN, seconds=100.0)["seconds"] == 100.0


def test_summary_survives_a_file(tmp_path: Any) -> None:
    results = summarise(runs(), OWN)
    write_json_atomic(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_held_out_tasks_are_shown_but_do_not_count() -> None:
    results = summarise([Run("sum", {"qa": 40.0, "new": 3.0})], {"qa": 80.0})
    assert results["retention"]["sum"]["mean"] == 0.5
    assert results["scores"]["sum"]["new"]["mean"] == 3.0


MOLE = {"qa": 1.0, "nli": 1.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            [Run("mole", MOLE, seed=1)],
            r"method 'mole' has runs with the seeds \[0, 1, 1\]; expected each of \[0, 1\] once",
        ),
        ([Run("base", MOLE)], r"method 'base' has runs with the seeds \[None, None\]"),
        ([Run("other", MOLE, seed=0)], r"method 'other' has runs with the seeds \[0\]"),
        ([Run("other", MOLE, seed=2)], "expected each of"),
        ([Run("base", MOLE, seed=0)], r"method 'base' has runs with the seeds \[None, 0\]"),
        ([Run("other", {"qa": 1.0})], "method 'other': no score for the task 'nli'"),
        ([Run("other", {**MOLE, "new": 1.0})], "the first run: no score for the task 'new'"),
    ],
)
def test_unfair_comparisons_are_refused(more: list[Run], message: str) -> None:
    with pytest.raises(LoraweaveError, match=message):
        summarise([*runs(), *more], OWN)


def test_summary_needs_runs_and_free_names() -> None:
    with pytest.raises(LoraweaveError, match="at least one run"):
        summarise([], OWN)
    with pytest.raises(LoraweaveError, match="'seeds'"):
        summarise(runs(), OWN, extra={"seeds": 3})


def test_spread_is_the_sample_deviation() -> None:
    values = [3.0, 5.0, 10.0]
    assert spread(values)["std"] == pytest.approx(statistics.stdev(values))
    assert spread([3.0]) == {"mean": 3.0, "std": 0.0, "per_seed": [3.0]}


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    a = [random.Random(0).random() for _ in range(40)]
    difference, low, high = paired_bootstrap([x + 2 for x in a], a, resamples=500)
    assert difference == pytest.approx(2)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    chance = random.Random(0)
    a, b = ([chance.gauss(mean, 1) for _ in range(400)] for mean in (0.3, 0.0))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(statistics.fmean(differences))
    assert low == pytest.approx(difference - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(difference + 1.96 * error, abs=0.15 * error)
    narrow = paired_bootstrap(a, b, confidence=0.5)
    assert low < narrow[1] < difference < narrow[2] < high
    mirrored = paired_bootstrap(b, a)
    assert mirrored == pytest.approx((-difference, -high, -low), abs=0.15 * error)


def test_bootstrap_pairs_items() -> None:
    # The items differ far more than the methods do: only pairing sees the difference.
    a = [float(100 * n + n % 2) for n in range(50)]
    b = [float(100 * n) for n in range(50)]
    _, low, _ = paired_bootstrap(a, b, resamples=2000)
    assert low > 0


def test_bootstrap_is_seeded_whatever_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = [float(n % 7) for n in range(3000)], [float(n % 5) for n in range(3000)]
    first = paired_bootstrap(a, b, resamples=700, seed=3)
    assert paired_bootstrap(a, b, resamples=700, seed=3) == first
    assert paired_bootstrap(a, b, resamples=700, seed=4) != first


def test_bootstrap_refuses() -> None:
    with pytest.raises(LoraweaveError, match="got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(LoraweaveError, match="got 0 and 0"):
        paired_bootstrap([], [])
    with pytest.raises(LoraweaveError, match="resamples"):
        paired_bootstrap([1.0], [1.0], resamples=0)
    with pytest.raises(LoraweaveError, match="confidence"):
        paired_bootstrap([1.0], [1.0], confidence=1.0)


def test_environment_names_versions_and_no_host() -> None:
    import platform

    import torch

    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert platform.node() not in json.dumps(found)


def test_peak_memory_grows_with_what_is_held_and_is_ones_own() -> None:
    """In processes of their own: a child must not report the memory of a large parent."""
    child = "from loraweave.evaluation.environment import peak_memory_gb; print(peak_memory_gb())"
    parent = f"""
import subprocess, sys
from loraweave.evaluation.environment import peak_memory_gb
before = peak_memory_gb()
block = b"x" * 400_000_000
print(peak_memory_gb() - before)
print(subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True, check=True).stdout)
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout.split()
    assert 0.35 < float(out[0]) < 0.5
    assert float(out[1]) < 0.2
    assert out[2] == "False"
    assert peak_memory_gb() is not None
    assert peak_gpu_memory_gb() is None or peak_gpu_memory_gb() > 0  # type: ignore[operator]
