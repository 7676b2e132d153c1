"""Whole runs: stored, resumed, killed, counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging_server import COLOURS, KEY, Judge, scores

from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.answers import Answers
from loraweave.evaluation.judges.judge import judge
from loraweave.evaluation.judges.pictures import Element, Pair, pairs, read_pictures
from loraweave.evaluation.judges.question import Question, questions
from loraweave.evaluation.judges.server import Server
from loraweave.evaluation.judges.tally import tally

Connect = Callable[..., Server]
WORTH = {"switch": 8.0, "merge": 4.0, "composite": 6.0}


def honest(judge_: Judge, bias: float = 0.0) -> Callable[[dict[str, Any]], str]:
    """Scores a method as ``WORTH`` says, with ``bias`` for the picture shown first."""
    worth = {colour: WORTH[method] for method, colour in COLOURS.items()}

    def answer(request: dict[str, Any]) -> str:
        first, second = (worth[colour] for colour in judge_.colours(request))
        return scores((first + bias, 5), (second, 5))

    return answer


@pytest.fixture
def asked(pictures: Path) -> list[Question]:
    return questions(pairs(read_pictures(pictures)))


def test_a_run_is_counted_with_its_position_bias(
    served: Judge, connect: Connect, asked: list[Question], tmp_path: Path
) -> None:
    served.usual = honest(served, bias=1.0)
    answers = Answers(tmp_path / "out", "model")
    assert judge(asked, connect(), answers, workers=3, progress=False) == 0
    assert len(served.requests) == 12
    counted = tally(asked, answers)
    versus = {(row["a"], row["b"]): row for row in counted["pairs"]}
    row = versus["switch", "merge"]
    assert row["composition"] == {"a": 8.5, "b": 4.5, "wins": 1.0, "ties": 0.0, "losses": 0.0}
    assert row["quality"] == {"a": 5.0, "b": 5.0, "wins": 0.0, "ties": 1.0, "losses": 0.0}
    assert versus["merge", "composite"]["composition"]["losses"] == 1.0
    assert (row["counted"], row["left_out"]) == (2, 0)
    assert counted["position"]["composition"] == {"bias": 1.0, "flips": 0.0}
    assert counted["position"]["quality"] == {"bias": 0.0, "flips": 0.0}
    assert (counted["answered"], counted["failed"], counted["open"]) == (12, 0, 0)


def test_nothing_is_asked_twice(served: Judge, connect: Connect, asked: list[Question], tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out", "model")
    judge(asked[:5], connect(), answers, progress=False)
    judge(asked, connect(), answers, progress=False)
    assert len(served.requests) == 12
    judge(asked, connect(), answers, progress=False)
    assert len(served.requests) == 12
    assert len(list(answers.folder.iterdir())) == 12


def test_nonsense_is_asked_again_then_stored_as_failed(
    served: Judge, connect: Connect, asked: list[Question], tmp_path: Path
) -> None:
    served.replies = ["no", "SCORES: 7", scores((1, 1), (2, 2)), f"no, {KEY}", "no", "no"]
    answers = Answers(tmp_path / "out", "model")
    assert judge(asked[:2], connect(), answers, attempts=3, progress=False) == 0
    first, second = (answers.get(question) for question in asked[:2])
    assert first is not None
    assert second is not None
    assert first["scores"]["second"] == {"composition": 2.0, "quality": 2.0}
    assert first["said"][:2] == ["no", "SCORES: 7"]
    assert first["tokens_in"] == 300
    assert second["failed"].startswith("cannot be read: expected 'SCORES:' once")
    assert second["said"] == ["no, ***", "no", "no"]
    counted = tally(asked[:2], answers)
    assert (counted["answered"], counted["failed"], counted["open"]) == (1, 1, 0)
    # One order alone does not count.
    assert counted["pairs"][0]["counted"] == 0
    assert counted["pairs"][0]["composition"]["wins"] is None
    judge(asked[:2], connect(), answers, progress=False)
    assert len(served.requests) == 6
    judge(asked[:2], connect(), answers, again=True, progress=False)
    assert len(served.requests) == 7
    assert tally(asked[:2], answers)["failed"] == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_server_that_is_down_stops_the_run_and_loses_nothing(
    served: Judge, connect: Connect, asked: list[Question], tmp_path: Path, workers: int
) -> None:
    served.replies = [scores((1, 1), (2, 2))] * 4
    served.usual = lambda request: (500, {}, "")
    answers = Answers(tmp_path / "out", "model")
    with pytest.raises(LoraweaveError, match=r"no answer to 3 questions in a row.*HTTP 500.*4 of 12 are answered"):
        judge(asked, connect(), answers, workers=workers, progress=False)
    assert len(answers.open(asked)) == 8
    served.usual = honest(served)
    before = len(served.requests)
    assert judge(asked, connect(), answers, progress=False) == 0
    assert len(served.requests) == before + 8


def test_one_question_that_fails_stays_open(
    served: Judge, connect: Connect, asked: list[Question], tmp_path: Path
) -> None:
    served.replies = ["HANG"] * 3
    answers = Answers(tmp_path / "out", "model")
    assert judge(asked, connect(), answers, progress=False) == 1
    assert answers.open(asked) == asked[:1]


def test_a_refused_question_is_stored_as_failed(
    served: Judge, connect: Connect, asked: list[Question], tmp_path: Path
) -> None:
    served.replies = [(400, {}, json.dumps({"error": {"message": "against our policy"}}))]
    answers = Answers(tmp_path / "out", "model")
    assert judge(asked, connect(), answers, progress=False) == 0
    answer = answers.get(asked[0])
    assert answer is not None
    assert "against our policy" in answer["failed"]


def test_a_damaged_answer_is_named(connect: Connect, asked: list[Question], tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out", "model")
    answers.put(asked[0], {"scores": {"first": {}}})
    with pytest.raises(LoraweaveError, match="expected 'scores' or 'failed'; delete it"):
        answers.get(asked[0])
    answers.path(asked[0]).write_text("{")
    with pytest.raises(LoraweaveError, match="cannot read the answer"):
        judge(asked, connect(), answers, progress=False)


def test_tally_by_hand(tmp_path: Path) -> None:
    """Three pairs of A and B; composition and quality of (first, second), forth (A first) and back (B first)."""
    table = {
        "one": (((8, 5), (6, 5)), ((7, 5), (6, 5))),  # A 8, 6 -> 7; B 6, 7 -> 6.5: A wins, though orders disagree
        "two": (((4, 2), (5, 9)), ((5, 9), (4, 2))),  # A 4, 4; B 5, 5: B wins; quality A 2, B 9
        "three": (((3, 7), (3, 6)), ((4, 6), (4, 7))),  # A 3, 4; B 3, 4: tie; quality A 7, 7, B 6, 6
    }
    answers = Answers(tmp_path, "m")
    asked = []
    for name, orders in table.items():
        pair = Pair(name, (Element("x"),), "A", "B", {})
        for (first, second), order in zip((("A", "B"), ("B", "A")), orders, strict=True):
            question = Question(pair, first, second, ("0", "1"))
            asked.append(question)
            said = [dict(zip(("composition", "quality"), values, strict=True)) for values in order]
            answers.put(question, {"scores": dict(zip(("first", "second"), said, strict=True))})
    counted = tally(asked, answers)
    (row,) = counted["pairs"]
    third = pytest.approx(1 / 3)
    assert row["composition"] == {
        "a": pytest.approx((7 + 4 + 3.5) / 3),
        "b": pytest.approx((6.5 + 5 + 3.5) / 3),
        "wins": third,
        "ties": third,
        "losses": third,
    }
    assert row["quality"]["wins"] == third
    assert row["quality"]["losses"] == third
    # First less second: 2, 1, -1, 1, 0, 0.
    assert counted["position"]["composition"] == {"bias": 0.5, "flips": third}
    assert counted["scores"][0] == {"id": "one", "method": "A", "against": "B", "composition": 7.0, "quality": 5.0}
    assert len(counted["scores"]) == 6


def command(pictures: Path, out: Path, served: Judge, *more: str) -> list[str]:
    return [
        *("judge", str(pictures), "-o", str(out), "--url", served.url, "--model", "model"),
        *("--timeout", "0.5", "--tries", "1", *more),
    ]


def test_the_command(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAWEAVE_JUDGE_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "120")
    served.usual = honest(served)
    out = tmp_path / "[" / "x]"  # no markup in a place, nor in a name
    pictures.write_text(pictures.read_text().replace('"merge"', '"[/x]"'))
    assert main(command(pictures, out, served, "--methods", "switch", "[/x]", "--price", "2.5", "10")) == 0
    said = capsys.readouterr().out
    assert "2 pairs in both orders: 4 questions, 0 of them answered before" in said
    assert "to ask: 4 calls with 8 pictures" in said
    assert "price: about 0.0" in said
    assert "switch / [/x]" in said
    assert f"{out / 'scores.jsonl'}: a score per picture" in said
    results = json.loads((out / "judgement.json").read_text())
    assert results["pairs"][0]["composition"]["wins"] == 1.0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert {row["composition"] for row in rows if row["method"] == "switch"} == {8.0}
    assert served.keys == [f"Bearer {KEY}"] * 4
    everything = said + "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert KEY not in everything
    assert main(["agree", str(out / "scores.jsonl"), "composition", "composition"]) == 0


def test_a_dry_run_asks_nothing_and_needs_no_server(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", str(pictures), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "to ask: 12 calls with 24 pictures" in said
    assert "1. hero: red {hair}, boots" in said
    assert not (tmp_path / "out").exists()
    assert served.requests == []


def test_nothing_but_nonsense_is_an_error_and_names_no_file_that_is_not_there(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.usual = lambda request: "both are nice"
    out = tmp_path / "out"
    assert main(command(pictures, out, served, "--attempts", "1")) == 2
    said = capsys.readouterr()
    assert "0 of 12 answers could be read and no pair in both orders" in said.err
    assert str(out / "answers") in said.err
    assert "--retry-failed" in said.err
    named = [Path(line.partition(": ")[0]) for line in said.out.splitlines() if line.startswith(str(out))]
    assert named == [out / "answers"]
    assert not (out / "judgement.json").exists()
    served.replies = [scores((1, 1), (2, 2))]
    assert main(command(pictures, out, served, "--attempts", "1", "--retry-failed")) == 2, "half a pair does not count"
    assert "1 of 12 answers could be read and no pair" in capsys.readouterr().err
    assert json.loads((out / "judgement.json").read_text())["answered"] == 1
    served.usual = lambda request: scores((1, 1), (2, 2))
    assert main(command(pictures, out, served, "--attempts", "1", "--retry-failed")) == 0


# Not even root can write in /proc/self.
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has such a place, others may not")
@pytest.mark.parametrize("place", ["/proc/self", "file/out"])
def test_a_place_that_cannot_be_written_costs_no_request(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(command(pictures, tmp_path / place, served)) == 2
    assert "error: cannot write '" in capsys.readouterr().err
    assert served.requests == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has such a place, others may not")
def test_answers_that_cannot_be_kept_cost_no_request(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers").symlink_to("/proc/self")
    assert main(command(pictures, tmp_path / "out", served)) == 2
    assert "error: cannot write '" in capsys.readouterr().err
    assert served.requests == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--price", "nan", "1"], "--price: expected a number, got 'nan'"),
        (["--price", "1", "-5"], "--price: expected a number of at least 0, got '-5'"),
        (["--timeout", "0"], "--timeout: expected a number above 0, got '0'"),
        (["--temperature", "inf"], "--temperature: expected a number, got 'inf'"),
        (["--temperature", "warm"], "--temperature: expected a number, got 'warm'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], said: str
) -> None:
    assert main(["judge", str(pictures), "-o", str(tmp_path / "out"), "--dry-run", *option]) == 2
    assert said in capsys.readouterr().err


def test_the_command_waits_as_long_as_the_server_asks(served: Judge, pictures: Path, tmp_path: Path) -> None:
    """Our own first wait is at least 0.75 s."""
    served.replies = [(429, {"retry-after": "0"}, "{}"), (503, {"retry-after": "1.5"}, "{}")]
    arguments = command(pictures, tmp_path / "out", served, "--methods", "switch", "merge", "--tries", "3")
    started = time.perf_counter()
    assert main(arguments) == 0
    assert 1.5 <= time.perf_counter() - started < 10
    assert len(served.requests) == 4 + 2


def test_open_questions_are_an_error_at_the_end(
    served: Judge, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.replies = ["CLOSE"]
    assert main(command(pictures, tmp_path / "out", served)) == 2
    assert "error: 1 of 12 questions are open" in capsys.readouterr().err
    assert main(command(pictures, tmp_path / "out", served)) == 0
    assert len(served.requests) == 13


def test_a_killed_run_goes_on(served: Judge, pictures: Path, tmp_path: Path) -> None:
    """The process is killed while the fifth question hangs: four answers are there, and eight more are asked."""
    out = tmp_path / "out"
    arguments = command(pictures, out, served, "--timeout", "60")
    stuck = []

    def usual(request: dict[str, Any]) -> Any:
        if len(served.requests) == 5 and not stuck:
            stuck.append(True)
            process.send_signal(signal.SIGKILL)
            return "HANG"
        return scores((1, 1), (2, 2))

    served.usual = usual
    process = subprocess.Popen([sys.executable, "-m", "loraweave", *arguments], env={**os.environ, "NO_PROXY": "*"})
    assert process.wait(60) == -signal.SIGKILL
    assert len(list((out / "answers").glob("*.json"))) == 4
    assert main(arguments) == 0
    assert len(served.requests) == 5 + 8
    assert json.loads((out / "judgement.json").read_text())["answered"] == 12
    sent = [json.dumps(request) for request in served.requests]
    assert len(set(sent)) == 12
