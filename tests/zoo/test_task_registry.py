"""The registry of generated tasks, and what holds for every one of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraweave.errors import LoraweaveError
from loraweave.zoo import tasks

N = 40


def test_there_are_enough_tasks_of_enough_kinds() -> None:
    assert len(tasks.names()) >= 128
    assert len(tasks.families()) >= 16
    assert len(set(tasks.names())) == len(tasks.names())


def test_phrases_are_distinct_so_that_the_input_names_the_task() -> None:
    phrases = [tasks.get(name).phrase for name in tasks.names()]
    assert len(set(phrases)) == len(phrases)


@pytest.mark.parametrize("name", tasks.names())
def test_every_task(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name == f"{task.family}/{task.variant}"
    assert task.description.endswith((".", "?"))
    drawn = {split: task.sample(N if split == "train" else 12, seed=3, split=split) for split in tasks.SPLITS}
    inputs = [row["input"] for rows in drawn.values() for row in rows]
    assert len(set(inputs)) == len(inputs), "an input came twice"
    for split, rows in drawn.items():
        assert rows == task.sample(len(rows), seed=3, split=split), "not deterministic"
        for row in rows:
            assert set(row) == {"input", "target"}
            assert row["input"].startswith(f"{task.phrase}: ")
            assert row["input"] == row["input"].strip().lower()
            assert 1 <= len(row["target"].split()) <= 14
            assert len(row["input"].split()) <= 34
            assert tasks.split_of(row["input"]) == split
    assert len({row["target"] for row in drawn["train"]}) > 1, "the answer never varies"


def test_seeds_differ_and_shorter_draws_are_prefixes() -> None:
    task = tasks.get("sort/a_to_z")
    assert task.sample(20, seed=0) != task.sample(20, seed=1)
    assert task.sample(20, seed=0)[:5] == task.sample(5, seed=0)
    assert task.sample(0) == []


def test_draws_do_not_depend_on_the_hash_seed() -> None:
    code = "from loraweave.zoo import tasks; print(tasks.get('sets/union').sample(3, 5, 'test'))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(LoraweaveError, match="did you mean 'sort/z_to_a'"):
        tasks.get("sort/z_to_aa")


def test_too_many_items_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"train split has about \d+ items, 5000 were asked for"):
        tasks.get("number_words/to_words").sample(5000)


def test_bad_arguments() -> None:
    task = tasks.get("sort/a_to_z")
    with pytest.raises(LoraweaveError, match="at least 0, got -1"):
        task.sample(-1)
    with pytest.raises(LoraweaveError, match="train, validation, test, got 'dev'"):
        task.sample(1, split="dev")  # type: ignore[arg-type]


def test_importing_the_zoo_loads_no_torch() -> None:
    code = "import sys, loraweave.zoo; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
