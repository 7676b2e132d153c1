"""What is asked, in which order, and how strictly answers are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.estimate import ANSWER_TOKENS, estimate, picture_tokens
from loraweave.evaluation.judges.pictures import pairs, read_pictures
from loraweave.evaluation.judges.question import parse, questions

GOOD = '{"first": {"composition": 7.5, "quality": 8}, "second": {"composition": 0, "quality": 10}}'
READ = {"first": {"composition": 7.5, "quality": 8.0}, "second": {"composition": 0.0, "quality": 10.0}}


@pytest.mark.parametrize(
    "answer",
    [
        f"SCORES: {GOOD}",
        f"The first is fine.\n\nSCORES: {GOOD}\n",
        f"SCORES:\n```json\n{json.dumps(json.loads(GOOD), indent=2)}\n```",
        f"```\nSCORES: {GOOD}\n```",
        f"**SCORES:** {GOOD}".replace("**SCORES:**", "**SCORES:"),
    ],
)
def test_clear_answers_are_read(answer: str) -> None:
    assert parse(answer) == READ


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "once, found it 0 times"),
        (GOOD, "once, found it 0 times"),
        (f"SCORES: {GOOD} SCORES: {GOOD}", "found it 2 times"),
        (f"SCORES: {GOOD} so the first wins", "not JSON"),
        ("SCORES: 7 and 8", "not JSON"),
        ("SCORES: [1, 2]", "expected the keys first, second"),
        ('SCORES: {"first": {"composition": 1, "quality": 1}}', "expected the keys first, second"),
        (f"SCORES: {GOOD}".replace('"quality": 8', '"beauty": 8'), "first: expected the keys"),
        (f"SCORES: {GOOD}".replace("7.5", "10.5"), "first.composition: expected a number from 0 to 10, got '10.5'"),
        (f"SCORES: {GOOD}".replace("7.5", "-1"), "first.composition"),
        (f"SCORES: {GOOD}".replace("7.5", "NaN"), "first.composition"),
        (f"SCORES: {GOOD}".replace("7.5", "true"), "first.composition"),
        (f"SCORES: {GOOD}".replace("7.5", '"7.5"'), "first.composition"),
        (f"SCORES: {GOOD}".replace("7.5", "7.5/10"), "not JSON"),
        (f"SCORES: {GOOD}".replace('"first"', '"second"'), "not JSON"),
        ("SCORES: " + "[" * 100_000, "not JSON"),
    ],
)
def test_unclear_answers_are_not_guessed(answer: str, why: str) -> None:
    found = parse(answer)
    assert isinstance(found, str)
    assert why in found


def test_every_pair_is_asked_in_both_orders(pictures: Path) -> None:
    asked = questions(pairs(read_pictures(pictures)))
    assert [(q.pair.id, q.first, q.second) for q in asked[:6]] == [
        ("hero/coat", "switch", "merge"),
        ("hero/coat", "merge", "switch"),
        ("hero/coat", "switch", "composite"),
        ("hero/coat", "composite", "switch"),
        ("hero/coat", "merge", "composite"),
        ("hero/coat", "composite", "merge"),
    ]
    assert len(asked) == 12
    assert "1. hero: red {hair}, boots\n2. coat\n" in asked[0].text


def test_keys_are_file_names_that_tell_questions_apart(pictures: Path) -> None:
    asked = questions(pairs(read_pictures(pictures), ["merge", "switch"]))
    keys = [question.key("model") for question in asked]
    assert keys[0].startswith("hero-coat--merge--switch--")
    assert len({*keys, *(question.key("other") for question in asked)}) == 8
    Image.new("RGB", (9, 9)).save(pictures.parent / "switch-0.png")
    again = [question.key("model") for question in questions(pairs(read_pictures(pictures), ["merge", "switch"]))]
    assert [a == b for a, b in zip(keys, again, strict=True)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": ""}, ":1: 'id' must be a text that no other row has"),
        ({"id": "hero/hat"}, ":2: 'id' must be a text that no other row has, got 'hero/hat'"),
        ({"elements": []}, ":1: 'elements' must be a list"),
        ({"elements": [{"features": ["x"]}]}, ":1: an element must be"),
        ({"elements": [{"name": "x", "features": "y"}]}, ":1: an element must be"),
        ({"pictures": {"switch": "nowhere.png"}}, "no such picture"),
        ({"pictures": ["switch-0.png"]}, ":1: 'pictures' must be {method: file}"),
    ],
)
def test_bad_rows_are_named(pictures: Path, change: dict[str, object], said: str) -> None:
    first, *rest = pictures.read_text().splitlines()
    pictures.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]))
    with pytest.raises(LoraweaveError, match=said.replace("{", r"\{")):
        read_pictures(pictures)


def test_methods_that_are_not_there(pictures: Path) -> None:
    rows = read_pictures(pictures)
    with pytest.raises(LoraweaveError, match="did you mean 'switch'"):
        pairs(rows, ["swich", "merge"])
    with pytest.raises(LoraweaveError, match="at least two different methods"):
        pairs(rows, ["merge"])
    first, second = pictures.read_text().splitlines()
    less = json.loads(second)
    del less["pictures"]["merge"]
    pictures.write_text(first + "\n" + json.dumps(less))
    with pytest.raises(LoraweaveError, match="row 'hero/hat': no picture of 'merge'"):
        pairs(read_pictures(pictures))


def test_a_file_that_is_no_picture(pictures: Path) -> None:
    (pictures.parent / "merge-1.png").write_text("text")
    with pytest.raises(LoraweaveError, match=r"merge-1.png' is no picture"):
        questions(pairs(read_pictures(pictures)))


def test_picture_tokens_by_hand() -> None:
    # OpenAI's own examples: 1024 x 1024 -> 768 x 768, 4 tiles; 2048 x 4096 -> 1024 x 2048 -> 768 x 1536, 6 tiles.
    assert picture_tokens(1024, 1024) == 765
    assert picture_tokens(2048, 4096) == 1105
    assert picture_tokens(512, 512) == 255
    assert picture_tokens(1, 100_000) == 85 + 170 * 4


def test_estimate_by_hand(pictures: Path) -> None:
    asked = questions(pairs(read_pictures(pictures), ["merge", "switch"]))
    cost = estimate(asked)
    text = sum(-(-len(question.text) // 4) for question in asked)
    assert (cost.calls, cost.pictures, cost.tokens_out) == (4, 8, 4 * ANSWER_TOKENS)
    assert cost.tokens_in == text + 8 * 255
    assert cost.price(2.0, 10.0) == pytest.approx((cost.tokens_in * 2 + 1200 * 10) / 1e6)
