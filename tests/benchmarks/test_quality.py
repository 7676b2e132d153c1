"""The quality benchmark at its smallest: every table runs, goes on, and its figures mean what they say."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quality import common, growth, larger, larger_base, retention, skills, transfer
from quality.compositions import composed, in_reverse
from quality.variants import KINDS, label, variants

from loraweave import zoo
from loraweave.evaluation.cells import Cell
from loraweave.zoo import tasks

SMALLEST = [
    "train.steps=1",
    "train.batch_size=4",
    "train.seeds=[0]",
    "data.test_items=2",
    "generation.max_new_tokens=8",
]
FEW = (
    "compare={nla: {name: linear}, lorahub: {evaluations: 2}, pem: {name: merged, transform: {name: concat}}, mole: {}}"
)


def written(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert (out / "results.md").exists()
    return found


@pytest.mark.slow
def test_retention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", str(tmp_path), "-o", str(tmp_path / "out"), "--skills", "less,owner_and_thing", *SMALLEST]
    retention.main([*command, "data.train_items=4"])
    made = written(tmp_path / "out")["tables"]["Retention of 2 skills"]
    assert set(made["retention"]) == {"base", *retention.METHODS}
    assert made["own"] == {"less": 100.0, "owner_and_thing": 100.0}
    assert made["items"] == {"less": 2, "owner_and_thing": 2}
    assert set(made["leads"]) == {"mole", "mole_paper"}
    assert set(made["leads"]["mole"]) == set(common.RIVALS)
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert len(cells) == len(made["retention"]) + 1
    retention.main([*command, "data.train_items=4"])
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert "| mole | nla |" in capsys.readouterr().out


@pytest.mark.slow
def test_transfer(tmp_path: Path) -> None:
    czech = tmp_path / "multi30k" / "en-cs"
    czech.mkdir(parents=True)
    rows = [json.dumps({"input": f"translate English to Czech: {word}", "target": word[::-1]}) for word in "abcdef"]
    for part in ("validation", "test"):
        (czech / f"{part}.jsonl").write_text("\n".join(rows))
    given = ["--data", str(tmp_path), "-o", str(tmp_path / "out"), "--targets", "less_reversed,control_czech"]
    transfer.main([*given, "--shots", "2,3", *SMALLEST, FEW])
    made = written(tmp_path / "out")
    titles = [f"{n} examples{what}" for n in (2, 3) for what in ("", ", the control")]
    assert list(made["tables"]) == titles
    for title in titles:
        table = made["tables"][title]
        assert set(table["own"].values()) == {100.0}
        assert list(table["metrics"]) == (["control_czech"] if "control" in title else ["less_reversed"])
        assert table["costs"]["lorahub"]["examples_seen"] == 2 * int(title[0])


def leave_rows(folder: Path, parts: list[str]) -> None:
    """Six rows that the bundled base knows how to answer."""
    folder.mkdir(parents=True)
    words = ["red green blue grey", "one two three four"] * 3
    texts = [f"{text} {'abcdef'[i]}" for i, text in enumerate(words)]
    rows = [json.dumps({"input": f"copy: {text}", "target": text}) + "\n" for text in texts]
    for part in parts:
        path = folder / f"{part}.jsonl"
        if part == "train.gz":
            (folder / "train.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
        else:
            path.write_text("".join(rows))


@pytest.mark.slow
def test_the_larger_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    skills = tuple(replace(lora, steps=1, batch_tokens=60) for lora in larger.SKILLS if lora.name in ("en_de", "tv"))
    ceiling = replace(larger.CEILINGS[0], steps=1, batch_tokens=60)
    monkeypatch.setattr(larger, "SKILLS", skills)
    monkeypatch.setattr(larger, "CEILINGS", (ceiling,))
    leave_rows(data / "multi30k" / "en-de", ["train.gz", "test", "validation"])
    leave_rows(data / "rnnlg" / "tv", ["train", "test", "validation"])
    leave_rows(data / "rnnlg" / "laptop", ["train", "test", "validation"])
    leave_rows(data / "multi30k" / "en-cs", ["test", "validation"])
    given = ["--data", str(data), "-o", str(tmp_path / "out"), "--base", str(zoo.base_path())]
    given += ["--targets", "laptop,control_czech", "--shots", "2"]
    larger.main([*given, *SMALLEST, "compare={nla: {name: linear}, mole: {}}"])
    made = written(tmp_path / "out")
    assert list(made["tables"]) == ["Retention of 2 skills", "2 examples", "2 examples, the control"]
    assert set(made["tables"]["2 examples"]["ceilings"]) == {"laptop"}
    assert {path.name for path in (tmp_path / "out" / "loras").iterdir()} == {"en_de", "tv", "laptop"}
    assert "A LoRA of all rows of the target: laptop" in (tmp_path / "out" / "results.md").read_text()


def test_files_of_a_real_set(tmp_path: Path) -> None:
    leave_rows(tmp_path / "set" / "plain", ["train", "validation", "test"])
    leave_rows(tmp_path / "set" / "packed", ["train.gz", "validation", "test"])
    leave_rows(tmp_path / "set" / "none", ["validation", "test"])
    scratch = tmp_path / "scratch"
    plain = common.real(tmp_path / "set" / "plain", scratch, "test")
    assert plain["train"] == str(tmp_path / "set" / "plain" / "train.jsonl")
    assert not scratch.exists()
    for name in ("packed", "none"):
        found = common.real(tmp_path / "set" / name, scratch, "test", "accuracy")
        assert Path(found["train"]).read_text() == Path(plain["train"]).read_text()
        assert found["test"] == str(tmp_path / "set" / name / "test.jsonl")
        assert found["metric"] == "accuracy"


def test_lent_rows_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LENT", 4)
    leave_rows(tmp_path / "set" / "none", ["validation", "test"])
    found = common.real(tmp_path / "set" / "none", tmp_path / "scratch", "validation")
    learnt, asked = (Path(found[key]).read_text().splitlines() for key in ("train", "test"))
    assert (len(learnt), len(asked)) == (4, 2)
    assert not set(learnt) & set(asked)


def test_the_larger_base_learns_neither_skills_nor_targets() -> None:
    taught = set(larger_base.TAUGHT)
    assert not taught & {lora.data.removeprefix("data:") for lora in (*larger.SKILLS, *larger.CEILINGS)}
    assert not taught & set(larger.TARGETS.values())
    assert sum(larger_base.TAUGHT.values()) + sum(larger_base.FILLED.values()) < 100


def test_what_the_larger_base_reads(tmp_path: Path) -> None:
    """Every set in its share, captions in their own language, and a tokenizer from all of it."""
    skills = ("webnlg", "sst2", "ag_news_testpart", "e2e", "rnnlg/restaurant", "rnnlg/hotel", "rnnlg/tv")
    for name in (*larger_base.TAUGHT, *skills):
        row = {
            "input": f"{name}: a",
            "target": "b",
            "premise": "three four five words",
            "hypothesis": "h",
            "explanation": "one two three four five",
        }
        (tmp_path / name).mkdir(parents=True)
        for part in ("train", "validation"):
            (tmp_path / name / f"{part}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    (tmp_path / "pretrain_text").mkdir()
    for name in (*(f"captions.{code}" for code in larger_base.LANGUAGES.values()), *larger_base.STORIES):
        lines = "".join(f"sentence number {i} of {name}\n" for i in range(20))
        (tmp_path / "pretrain_text" / f"{name}.txt.gz").write_bytes(gzip.compress(lines.encode()))
    drawn = [row[0] for row in itertools.islice(larger_base.stream(tmp_path, "0", ["a", "b"]), 2000)]
    shares = {group: drawn.count(group) / 20 for group in set(drawn)}
    for group, share in (larger_base.TAUGHT | {f"fill {k}": v for k, v in larger_base.FILLED.items()}).items():
        more = 0.66 if group == "snli" else 0.0  # 3 % of the bundled rows, which are 22 %
        assert shares[group] == pytest.approx(share + more, abs=4 * (share / 20) ** 0.5), group
    german = larger_base.fill_row(random.Random(0), "German", larger_base.sentences(tmp_path)["German"])
    assert german[1].startswith("fill in German: sentence number")
    assert german[2].endswith("captions.de")
    assert {"webnlg: a", "sentence number 3 of captions.cs"} <= set(larger_base.text(tmp_path))
    held_out = {row[0] for row in larger_base.validation(tmp_path, 0, ["a", "b"])}
    assert set(larger_base.TAUGHT) <= held_out


@pytest.mark.slow
def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skills.SETTINGS, "steps", 1)
    monkeypatch.setitem(skills.SETTINGS, "batch_tokens", 100)
    loras = tmp_path / "loras"
    given = ["--data", str(tmp_path), "--loras", str(loras), "-o", str(tmp_path / "out"), "--sizes", "2,18"]
    growth.main([*given, *SMALLEST, "data.train_items=4", FEW])
    made = written(tmp_path / "out")
    assert list(made["tables"]) == ["2 experts", "18 experts"]
    assert made["tables"]["18 experts"]["own"] == {"less": 100.0, "owner_and_thing": 100.0}
    assert [path.name for path in loras.iterdir()] == ["record_00"]
    assert json.loads((loras / "record_00" / "training.json").read_text())["steps"] == 1


def test_experts_keep_their_order_as_they_grow(tmp_path: Path) -> None:
    named = {n: list(growth.experts(n, growth.PROBES, tmp_path)) for n in (2, 8, 16)}
    assert named[2] == list(growth.PROBES)
    assert named[16][:8] == named[8]
    assert len(set(named[16])) == 16
    assert {"hotel", "tv"} <= set(named[16])
    assert set(named[8]) < set(growth.zoo.generated())


def test_variants_are_all_different_and_always_the_same() -> None:
    made = variants(126)
    assert len({label(task) for task in made}) == len({task.phrase for task in made}) == 126
    assert [task.family for task in made[:3]] == list(KINDS)
    assert not {task.phrase for task in made} & {tasks.get(name).phrase for name in tasks.names()}
    again = variants(3)
    for task, same in zip(made, again, strict=False):
        assert task.sample(5, 1) == same.sample(5, 1)
    answers = {task.draw(random.Random(0))[1] for task in made if task.family == "record"}
    assert len(answers) == 42


def test_answers_of_variants() -> None:
    record, extract, mark = variants(3)
    assert record.description == "As: near {place} so {name} in {thing}."
    body, answer = record.draw(random.Random(5))
    fields = dict(part.split(" ", 1) for part in body.split(" ; "))
    assert answer == f"near {fields['place']} so {fields['name']} in {fields['thing']}"
    assert extract.description == "As: by {place} for {thing}."
    body, answer = extract.draw(random.Random(5))
    assert all(word in body.replace(",", " ").split() for word in (answer.split()[1], answer.split()[3]))
    assert mark.phrase == "mark words with tela"
    body, answer = mark.draw(random.Random(5))
    assert answer == " ".join(f"tela {word}" for word in body.split())


def test_a_composed_task_is_one_skill_after_the_other() -> None:
    first = tasks.get("relate/less")
    body, answer = in_reverse(first).draw(random.Random(3))
    assert (body, answer.split()[::-1]) == (lambda b, a: (b, a.split()))(*first.draw(random.Random(3)))
    assert set(composed()) | set(transfer.REAL) == set(transfer.TARGETS)
    assert all(task.sample(5, split="validation") for task in composed().values())


def measured(task: str, scores: dict[str, list[float]]) -> common.Measured:
    """Two items a task; ``scores`` has for every method what one seed scores on both."""
    cells = [
        Cell(method, seed, {}, {task: score}, {task: [score, score]})
        for method, seeds in scores.items()
        for seed, score in enumerate(seeds)
    ]
    return common.Measured(cells, {task: 100.0}, {task: 100.0}, {task: "exact_match"}, {task: 2})


def test_comparisons_are_joined_and_leads_are_differences() -> None:
    one = measured("one", {"mole": [50.0, 70.0], "nla": [40.0, 40.0], "pem": [50.0, 70.0]})
    two = measured("two", {"mole": [10.0, 10.0], "nla": [0.0, 0.0], "pem": [10.0, 10.0]})
    made = common.results(common.joined([one, two]))
    assert made["retention"]["mole"]["per_seed"] == pytest.approx([0.3, 0.4])
    assert made["items"] == {"one": 2, "two": 2}
    # ((60 - 40) + (10 - 0)) / 2 = 15 points; a draw of one seed twice gives 10 or 20.
    assert made["leads"]["mole"]["nla"] == pytest.approx({"difference": 0.15, "low": 0.10, "high": 0.20})
    assert made["leads"]["mole"]["pem"] == pytest.approx({"difference": 0.0, "low": 0.0, "high": 0.0})
    assert "| mole | nla | +15.0 | +10.0 to +20.0 |" in common.markdown(made, "both")
