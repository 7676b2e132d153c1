"""A comparison goes on where it was cut off, notices a changed recipe, and is shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import loraweave as lw
from loraweave.cli import answering, main
from loraweave.evaluation.cells import CELLS, fingerprint

COMPARE = "compare={sum: {}, mole: {}, lorahub: {evaluations: 3}, fresh_lora: {}}"
SEEDS = "train.seeds=[0, 1]"
# base, two singles, sum; mole, lorahub and fresh_lora with two seeds.
EVERY = 4 + 3 * 2
# What does not hang on clocks.
SAME = ("retention", "scores", "own", "seeds", "differences", "items", "kept")


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["compare", str(recipe), "-o", str(out), COMPARE, SEEDS, *more]


def results(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    return {name: found[name] for name in SAME}


def cells(out: Path) -> dict[str, int]:
    """Name -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / CELLS).glob("[!.]*.json")}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(world / "recipe.yaml", out)) == 0
    return out


def test_a_cell_for_every_method_and_seed(whole: Path) -> None:
    assert len(cells(whole)) == EVERY
    mole = [json.loads(path.read_text()) for path in sorted((whole / CELLS).glob("mole-*.json"))]
    assert [cell["seed"] for cell in mole] == [0, 1]
    found = json.loads((whole / "results.json").read_text())
    for seed, cell in enumerate(mole):
        assert found["scores"]["mole"]["size"]["per_seed"][seed] == cell["scores"]["size"]
        assert sum(cell["items"]["size"]) / len(cell["items"]["size"]) == pytest.approx(cell["scores"]["size"])
        assert any(name.startswith("entropy/") for record in cell["history"] for name in record)
        assert (cell["cost"]["evaluations"], cell["cost"]["examples_seen"]) == (3, 12)
    costs = found["costs"]
    assert (costs["lorahub"]["evaluations"], costs["lorahub"]["examples_seen"]) == (3, 3 * 32)
    assert costs["sum"]["train_seconds"] == 0
    assert costs["mole"]["train_seconds"] > 0
    assert costs["mole"]["seconds_per_item"] > 0
    assert set(found["differences"]) == {"base", "sum", "mole", "lorahub", "fresh_lora"}


def test_the_same_again_makes_nothing(whole: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, made = results(whole), cells(whole)
    assert main(command(recipe, whole)) == 0
    said = capsys.readouterr()
    assert f"{EVERY} of {EVERY} cells are there already" in said.err
    assert cells(whole) == made
    assert results(whole) == before
    assert "ms/item" in said.out


@pytest.mark.parametrize("after", [0, 3, 7])
def test_what_was_cut_off_goes_on(
    whole: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Interrupted while cell number ``after`` is scored."""
    out, asked = tmp_path / "out", 0
    predict = answering.predict

    def interrupted(*arguments: Any, **options: Any) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == after + 1:
            raise KeyboardInterrupt
        return predict(*arguments, **options)

    monkeypatch.setattr(answering, "predict", interrupted)
    assert main(command(recipe, out)) == 130
    assert not (out / "results.json").exists()
    kept = cells(out)
    assert len(kept) == after
    assert main(command(recipe, out)) == 0
    assert results(out) == results(whole)
    assert kept.items() <= cells(out).items(), "a cell was made twice"
    assert len(cells(out)) == EVERY
    assert set(cells(out)) <= set(cells(whole))
    assert (out / "mixture" / "gates.safetensors").read_bytes() == (
        whole / "mixture" / "gates.safetensors"
    ).read_bytes()


def test_a_changed_recipe_makes_what_it_changes_and_says_so(
    whole: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = cells(whole)
    assert main(command(recipe, whole, "train.learning_rate=0.02")) == 0
    said = capsys.readouterr().err
    assert "4 of 10 cells are there already" in said
    assert "6 cells of an earlier recipe are not used: they differ in train.learning_rate" in said
    assert len(cells(whole)) == EVERY + 6
    assert before.items() <= cells(whole).items(), "what was there stays, for the earlier recipe"
    assert main(command(recipe, whole)) == 0
    assert f"{EVERY} of {EVERY} cells are there already" in capsys.readouterr().err


def test_cells_of_an_earlier_format_are_made_anew(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lack what intervals are made of, and must not be mixed with others."""
    out, few = tmp_path / "out", "compare=[sum]"
    assert main([*command(recipe, out), few]) == 0
    first = results(out)
    for path in (out / CELLS).glob("*.json"):
        cell = json.loads(path.read_text())
        del cell["counts"], cell["process"], cell["key"]["format"]
        cell |= {"format": 1, "fingerprint": fingerprint(cell["key"]), "scores": {"colour": 1.0, "size": 1.0}}
        path.unlink()
        (out / CELLS / f"{path.stem[:-16]}{cell['fingerprint'][:16]}.json").write_text(json.dumps(cell))
    capsys.readouterr()
    assert main([*command(recipe, out), few]) == 0
    assert "4 cells of an earlier recipe are not used: they differ in format" in capsys.readouterr().err
    assert results(out) == first
    assert len(cells(out)) == 8


IN_SENTENCES = """\
base: zoo
experts: [zoo:notice, zoo:polite]
compare: [sum, linear]
data:
  tasks:
    notice: {test: zoo:record/notice, metric: bleu}
    polite: {test: zoo:record/polite, metric: bleu}
  test_items: 5
generation: {max_new_tokens: 24}
"""


def test_differences_are_those_of_the_scores_shown(tmp_path: Path) -> None:
    """BLEU included, which is no mean of items."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(IN_SENTENCES)
    assert main(["compare", str(recipe), "-o", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    cell = json.loads(next((out / CELLS).glob("linear-*.json")).read_text())
    assert [len(counts) for counts in cell["counts"]["notice"]] == [10] * 5
    assert sum(cell["items"]["notice"]) / 5 != pytest.approx(cell["scores"]["notice"], abs=0.5)
    for method, against in found["differences"].items():
        kept = [found["retention"][name]["mean"] for name in (method, against["rival"])]
        assert against["difference"] == pytest.approx(kept[0] - kept[1])
        for task, in_points in against["tasks"].items():
            shown = [found["scores"][name][task]["mean"] for name in (method, against["rival"])]
            assert in_points["difference"] == pytest.approx(shown[0] - shown[1])


def test_fresh_makes_all_anew(recipe: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "out", "compare=[sum]"
    assert main([*command(recipe, out), few]) == 0
    before = cells(out)
    assert main([*command(recipe, out), few, "--fresh"]) == 0
    assert set(cells(out)) == set(before)
    assert all(written > before[name] for name, written in cells(out).items())


def test_a_label_of_every_table_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(recipe), "-o", str(tmp_path / "out"), "compare={'only:me': {name: sum}}"]) == 2
    assert "compare.only:me: every comparison has such a row" in capsys.readouterr().err


def test_xlora_is_refused_in_one_line_where_peft_cannot(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(recipe), "-o", str(tmp_path / "out"), "compare=[xlora]"]) == 2
    assert "peft's X-LoRA is for decoder-only models" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(lw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# Long enough for the second process to find something to do when it comes late.
LONGER = ("train.steps=60", "train.seeds=[0, 1, 2, 3]")
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def shared(recipe: Path, out: Path, launcher: str, *program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *program, *command(recipe, out, *LONGER)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def longer(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("longer") / "out"
    assert main(command(world / "recipe.yaml", out, *LONGER)) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_the_work(longer: Path, recipe: Path, tmp_path: Path, launcher: str) -> None:
    out = tmp_path / "out"
    done = shared(recipe, out, launcher, "-m", "loraweave")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(out) == results(longer)
    assert set(cells(out)) == set(cells(longer))
    makers = Counter(json.loads((out / CELLS / name).read_text())["process"] for name in cells(out))
    assert set(makers) == {0, 1}, "one process did everything"
    assert done.stdout.count("ms/item") == 1, "one of them writes the table"


BREAKS = """\
import os, sys
from loraweave.cli import answering, main
if os.environ["RANK"] == "1":
    answering.predict = None
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_process_that_fails_is_not_passed_over(recipe: Path, tmp_path: Path, launcher: str) -> None:
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS)
    done = shared(recipe, tmp_path / "out", launcher, str(script))
    assert done.returncode != 0
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


@pytest.mark.slow
def test_a_killed_process_loses_one_cell_at_most(whole: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "loraweave", *command(recipe, out)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / CELLS).exists() or len(cells(out)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = cells(out)
    assert 5 <= len(kept) <= EVERY
    assert main(command(recipe, out)) == 0
    assert kept.items() <= cells(out).items()
    assert len(cells(out)) == EVERY
    assert results(out) == results(whole)
