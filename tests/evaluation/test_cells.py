"""Cells are found again, told apart by what they hang on, and worked on by one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loraweave as lw
from loraweave.errors import LoraweaveError
from loraweave.evaluation.cells import Cell, Cells, Cost, fingerprint, hash_examples, hash_expert
from loraweave.evaluation.data import Example
from loraweave.evaluation.environment import peak_memory, peak_memory_gb

KEY = {"train": {"steps": 3}, "tests": {"qa": {"data": "aa"}}}


def cell(**changes: Any) -> Cell:
    cost = Cost(train_seconds=1.5, evaluations=3, examples_seen=12, score_seconds=0.5, peak_memory_gb=0.25)
    given: dict[str, Any] = {
        "method": "mole",
        "seed": 0,
        "key": KEY,
        "scores": {"qa": 50.0},
        "items": {"qa": [0.0, 100.0]},
    }
    return Cell(**{**given, "cost": cost, "history": [{"step": 1, "loss": 0.5}], **changes})


def test_a_cell_comes_back_as_it_was(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    assert cells.find("mole", 0, KEY) is None
    gates = {"W": torch.arange(6.0).view(2, 3).T}
    cells.save(cell(), gates)
    assert Cells(tmp_path).find("mole", 0, KEY) == cell()
    assert cell().seconds == 2.0
    assert torch.equal(cells.gates("mole", 0, KEY)["W"], gates["W"])
    assert cells.gates("mole", 1, KEY) == {}
    assert (tmp_path / cells.path("mole", 0, KEY).with_suffix(".safetensors")).stat().st_mode & 0o044 == 0o044


def test_another_recipe_is_another_cell_and_says_what_differs(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.save(cell())
    other = {"train": {"steps": 4}, "tests": {"qa": {"data": "aa"}, "nli": {"data": "bb"}}}
    assert cells.find("mole", 0, other) is None
    assert cells.differing("mole", 0, other) == ["train.steps", "tests.nli"]
    assert cells.differing("mole", 0, KEY) == []
    assert cells.differing("mole", 1, other) == cells.differing("sum", 0, other) == []
    cells.save(cell(key={**other, "train": {"steps": 5}}))
    # The nearest one counts.
    assert cells.differing("mole", 0, other) == ["train.steps"]
    assert cells.find("mole", 0, KEY) == cell()


def test_labels_become_file_names_and_stay_apart(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    labels = ["../../etc/passwd", "a/b", "a?b", "a" * 300, "", "..", "mole", "mole-0"]
    for label in labels:
        cells.save(cell(method=label, scores={"qa": float(len(label))}))
    for label in labels:
        found = cells.find(label, 0, KEY)
        assert found is not None
        assert found.scores == {"qa": float(len(label))}
    assert len(list(tmp_path.glob("*.json"))) == len(labels)


def test_a_fingerprint_hangs_on_content_and_not_on_the_order_of_fields() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    rows = [Example("a", "b"), Example("c", "d", ("e",))]
    assert hash_examples(rows) == hash_examples(list(rows)) != hash_examples(rows[::-1])
    assert hash_examples(rows) != hash_examples([Example("a", "b"), Example("c", "d")])


def test_an_expert_made_in_memory_has_a_hash_of_its_numbers() -> None:
    def made(value: float, dtype: torch.dtype = torch.bfloat16) -> lw.Expert:
        A, B = torch.ones(1, 2, dtype=dtype), torch.full((2, 1), value, dtype=dtype)
        return lw.Expert("x", {"q": lw.LoraFactors(A, B, 1.0)})

    assert hash_expert(made(1.0)) == hash_expert(made(1.0))
    assert len({hash_expert(made(1.0)), hash_expert(made(2.0)), hash_expert(made(1.0, torch.float32))}) == 3
    assert hash_expert(lw.Expert("x", {}, sha256="abc")) == "abc"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1', "changed"])
def test_what_is_no_cell_is_said(tmp_path: Path, content: str) -> None:
    cells = Cells(tmp_path)
    cells.save(cell())
    path = cells.path("mole", 0, KEY)
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"key": {"train": 1}}) if content == "changed" else content)
    with pytest.raises(LoraweaveError, match=r"not a cell of a comparison .* remove it and run again"):
        cells.find("mole", 0, KEY)


CHILD = """
import sys, time
from loraweave.evaluation.cells import Cells
with Cells(sys.argv[1]).claim("mole", 0, {}) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_death_gives_back(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        with cells.claim("mole", 0, {}) as ours:
            assert not ours
        with cells.claim("mole", 1, {}) as other:
            assert other
        child.kill()
    with cells.claim("mole", 0, {}) as ours:
        assert ours
        cells.save(cell(key={}))
    with cells.claim("mole", 0, {}) as ours:
        assert not ours, "a cell that is there is not made again"


def test_peak_memory_of_a_block_and_of_all() -> None:
    with peak_memory() as first:
        block = b"x" * 200_000_000
        del block
    with peak_memory() as second:
        pass
    whole = peak_memory_gb()
    if first["peak_memory_gb"] is None or second["peak_memory_gb"] is None or whole is None:
        pytest.skip("this system does not tell, or cannot forget, a peak")
    assert first["peak_memory_gb"] > second["peak_memory_gb"] + 0.15
    assert whole >= first["peak_memory_gb"]
