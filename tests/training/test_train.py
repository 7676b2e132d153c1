"""``lw.train``: gates learned in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

import loraweave as lw
import tiny

DATA = [{"input": f"{a} and {b}", "target": b} for a in "abcd" for b in ("xy", "zz", "k9")]


def train(mixture: Any, data: Any = DATA, **options: Any) -> lw.TrainingResult:
    settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "progress": False, "use_cpu": True}
    settings["tokenizer"] = tiny.tokenizer(mixture.model.config.is_encoder_decoder)
    return lw.train(mixture, data, **(settings | options))


@pytest.mark.parametrize("architecture", lessons.ARCHITECTURES)
def test_train(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in DATA))
    mixture = lessons.mixture(architecture)
    result = train(mixture, file, steps=20, batch_size=12, balance=0.0)
    losses = [entry["task_loss"] for entry in result.history if "task_loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    assert (result.steps, result.seconds > 0) == (20, True)
    assert not mixture.model.training
    mixture.model.generate(**tiny.batch("bert", (3,)), max_new_tokens=2)


def test_a_seed_decides_everything() -> None:
    runs = []
    for seed in (1, 1, 2):
        mixture = lessons.mixture("t5", dropout_rate=0.1)
        train(mixture, seed=seed)
        runs.append(lessons.gates(mixture))
    assert lessons.same(runs[0], runs[1])
    assert not lessons.same(runs[0], runs[2])


def test_training_mode_is_given_back() -> None:
    mixture = lessons.mixture("t5")
    mixture.model.train()
    train(mixture, steps=1)
    assert mixture.model.training
    mixture.model.eval()
    mixture.policy = lw.MoLE(pooling="flatten", max_length=1)
    with pytest.raises(lw.LoraweaveError, match="max_length=1"):
        train(mixture, steps=1)
    assert not mixture.model.training


def test_datasets_and_other_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    results = []
    for data in (DATA, tuple(DATA), datasets.Dataset.from_list(DATA)):
        mixture = lessons.mixture("llama")
        train(mixture, data)
        results.append(lessons.gates(mixture))
    assert lessons.same(results[0], results[1])
    assert lessons.same(results[0], results[2])


def test_nothing_is_left_without_an_output_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train(lessons.mixture("llama"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "the data is empty"),
        ({"data": "nowhere.jsonl"}, "no such data file: 'nowhere.jsonl'"),
        ({"data": [{"input": "a"}]}, "row 1: no 'target'"),
        ({"data": 3}, "expected a .jsonl file or rows of data"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"resume": True}, "resume: nothing to resume from; give the output_dir"),
        ({"tokenizer": None}, "tokenizer: this model was not loaded from a folder or the hub; pass tokenizer="),
        ({"max_input_length": 0}, "max_input_length: expected at least 1 token"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    mixture = lessons.mixture("t5")
    before = lessons.gates(mixture)
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        train(mixture, **options)
    assert "\n" not in str(error.value)
    assert lessons.same(lessons.gates(mixture), before)


def test_policies_without_gates_have_nothing_to_train() -> None:
    with pytest.raises(lw.LoraweaveError, match="nothing to train: a 'sum' policy has no gates"):
        train(lessons.mixture("t5", lw.Sum()))


def test_sequences_longer_than_a_flatten_gate() -> None:
    mixture = lessons.mixture("t5", lw.MoLE(pooling="flatten", max_length=4))
    with pytest.raises(lw.LoraweaveError, match=r"at most max_length=4 tokens, got \d+; shorten the input"):
        train(mixture)
    train(mixture, max_input_length=4, max_target_length=4)


def test_prompt_gates_read_the_prompt_alone() -> None:
    """From text to gate: another answer to the same question leaves the gates' decisions as they were."""
    from loraweave.evaluation.data import Example
    from loraweave.text import Collator, encode_example

    mixture = tiny.randomize(lessons.mixture("llama", lw.MoLE(pooling="prompt")))
    tokenizer = tiny.tokenizer(False)
    seen = []
    for answers in (("yes", "no"), ("maybe so", "x")):
        rows = [
            encode_example(tokenizer, Example(question, answer), is_encoder_decoder=False)
            for question, answer in zip(("is it", "was it really"), answers, strict=True)
        ]
        with mixture.record() as log, torch.no_grad():
            mixture.model(**Collator(tokenizer)(rows))
        seen.append(log.weights)
    assert seen[0]
    for name, g in seen[0].items():
        assert torch.allclose(g, seen[1][name], atol=1e-6), name
        assert not torch.allclose(g[0], g[1], atol=1e-3)


def test_the_papers_settings() -> None:
    from loraweave.training.train import PAPER

    assert PAPER == {"learning_rate": 1e-5, "steps": 800, "batch_size": 12, "balance": 0.5}
    train(lessons.mixture("t5", lw.MoLE.paper()), **(PAPER | {"steps": 1}))
