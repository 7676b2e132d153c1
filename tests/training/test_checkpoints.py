"""Checkpoints: what they hold, and that a resumed run ends where an uninterrupted one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lessons
import pytest
import torch
from safetensors.torch import load_file

import loraweave as lw
import tiny
from loraweave.training.trainer import last_whole_checkpoint

WORDS = ("abc", "bcd", "cde", "dab", "eba", "fac", "gab", "had")
TEXT = [{"input": f"say {word}", "target": word[::-1]} for word in WORDS]


def run(folder: Path, steps: int = 6, dropout: float = 0.2, **options: Any) -> tuple[Any, lw.TrainingResult]:
    mixture = lessons.mixture("t5", dropout_rate=dropout)
    result = lw.train(
        mixture,
        TEXT,
        steps=steps,
        batch_size=3,
        learning_rate=0.05,
        tokenizer=tiny.tokenizer(),
        output_dir=folder,
        progress=False,
        save_steps=2,
        save_total_limit=9,
        use_cpu=True,
        **options,
    )
    return mixture, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> tuple[Path, Any, lw.TrainingResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def test_a_checkpoint_holds_gates_and_not_the_model(whole: Any) -> None:
    folder, mixture, _ = whole
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    last = folder / "checkpoint-6"
    names = {p.name for p in last.iterdir()}
    assert {"gates.safetensors", "mixture.json", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
    saved = load_file(last / "gates.safetensors")
    assert lessons.same(saved, lessons.gates(mixture))
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    learned = sum(p.numel() for _, p in mixture.gate_parameters() if p.requires_grad)
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == learned


def test_a_resumed_run_equals_an_uninterrupted_one(whole: Any, tmp_path: Path) -> None:
    folder, mixture, _ = whole
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(folder / name, tmp_path / name)
    again, result = run(tmp_path, resume=True)
    assert result.steps == 6
    assert lessons.same(lessons.gates(again), lessons.gates(mixture))
    assert [e["step"] for e in result.history if "task_loss" in e] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_was_cut_off_is_passed_over(whole: Any, tmp_path: Path) -> None:
    folder, mixture, _ = whole
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again, _ = run(tmp_path, resume=True)
    assert lessons.same(lessons.gates(again), lessons.gates(mixture))


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("trainer_state.json", "gates.safetensors"):
            (tmp_path / f"checkpoint-{step}" / name).write_text("")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_nothing_to_resume_starts_afresh(tmp_path: Path) -> None:
    _, result = run(tmp_path / "new", steps=2, resume=True)
    assert result.steps == 2


def test_a_damaged_checkpoint_is_an_error_of_ours(whole: Any, tmp_path: Path) -> None:
    folder, _, _ = whole
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "gates.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(lw.LoraweaveError, match=r"gates.safetensors: damaged or not a safetensors file"):
        run(tmp_path, resume=True)


def test_a_checkpoint_is_a_saved_mixture(tmp_path: Path) -> None:
    """Gates of a checkpoint can be loaded like any other mixture's."""
    host = tiny.model("t5")
    sources = {n: lw.write_expert(e, tmp_path / n) for n, e in tiny.experts(host, "t5").items()}
    mixture = lw.attach(host, sources, lw.MoLE())
    out = tmp_path / "run"
    options = {"steps": 2, "batch_size": 3, "progress": False, "use_cpu": True}
    lw.train(mixture, TEXT, tokenizer=tiny.tokenizer(), output_dir=out, **options)
    expected = tiny.logits(host, tiny.batch("t5"))
    (checkpoint,) = out.glob("checkpoint-2")
    other = tiny.model("t5")
    lw.load(checkpoint, other)
    assert torch.equal(tiny.logits(other, tiny.batch("t5")), expected)
