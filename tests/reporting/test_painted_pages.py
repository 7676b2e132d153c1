"""Pages about pictures and judgements: every picture and every number at its place."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import EVIL, Reader, colour, judged_folder, painted_folder, scored, stands_alone

from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.files import write_json_atomic
from loraweave.reporting.page import render


def shown(read: Reader) -> list[tuple[str, Image.Image]]:
    """What each picture is said to be, and the picture."""
    sources = [(str(a["alt"]), str(a["src"]).partition("base64,")[2]) for tag, a in read.tags if tag == "img"]
    return [(alt, Image.open(io.BytesIO(base64.b64decode(source)))) for alt, source in sources]


def test_every_picture_stands_under_its_method_and_beside_its_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = painted_folder(tmp_path / "run", ("merge", "switch", "composite"))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    read = stands_alone((run / "report.html").read_text(encoding="utf-8"))
    (sheet,) = read.tables
    assert sheet[0] == ["", "merge", "switch", "composite"]
    assert [row[0] for row in sheet[1:]] == ["a hero, a coat 0", "a hero, a coat 1"]
    pictures = shown(read)
    assert [alt for alt, _ in pictures[:2]] == ["merge: a hero, a coat 0", "switch: a hero, a coat 0"]
    found = [picture.convert("RGB").getpixel((4, 4)) for _, picture in pictures]
    assert found == [colour(row, column) for row in range(2) for column in range(3)]
    assert any("Nothing is scored yet" in part for part in read.text)


def test_seeds_are_told_where_they_differ(tmp_path: Path) -> None:
    (sheet,) = stands_alone(render(painted_folder(tmp_path, seeds=True))).tables
    assert [row[0] for row in sheet[1:]] == ["a hero, a coat 0; seed 0", "a hero, a coat 1; seed 1"]


def test_of_many_pictures_some_are_shown(tmp_path: Path) -> None:
    page = render(painted_folder(tmp_path, rows=30, side=700))
    read = stands_alone(page)
    assert len(read.tables[0]) == 13
    assert any("18 rows more are painted" in part for part in read.text)
    # Made smaller: a page must not weigh what the pictures do.
    assert {max(picture.size) for _, picture in shown(read)} == {320}
    assert len(page) < 200_000


def test_scores_and_published_figures(tmp_path: Path) -> None:
    run = painted_folder(tmp_path)
    scores = {
        "merge": {"text_alignment": 0.31, "image_alignment_boot": 0.7, "dino_image_alignment": 0.41},
        "switch": {"text_alignment": 0.35, "image_alignment_boot": 0.6, "dino_image_alignment": 0.41},
    }
    printed = {"merge": {"text_alignment": 0.111}, "switch": {"text_alignment": 0.222, "image_alignment_boot": 0.333}}
    scored(run, scores, {"source": "Paper", "scores": printed})
    read = stands_alone(render(run))
    table = read.table("method")
    assert table["method"] == [
        "text alignment",
        "image alignment: boot",
        "DINO image alignment",
        "distinctness",
        "all elements",
    ]
    assert table["merge"] == ["0.310", "0.700", "0.410", "0.500", "0.250"]
    assert table["switch"] == ["0.350", "0.600", "0.410", "0.600", "0.250"]
    # The best of a column; no mark where all are alike.
    best = [attributes.get("class") for tag, attributes in read.tags if tag == "td"][:10]
    assert best == [None, "best", None, None, None, "best", None, None, "best", None]
    elements = read.table("method", 1)
    assert elements == {"method": ["hero", "coat"], "merge": ["100 %", "0 %"], "switch": ["100 %", "0 %"]}
    pairs = next(rows for rows in read.tables if rows[1][1:3] == ["paper", "here"])
    assert pairs[0] == ["", "text alignment", "image alignment: boot"]
    assert pairs[2:] == [
        ["merge", "0.111", "0.310", "–", "0.700"],
        ["switch", "0.222", "0.350", "0.333", "0.600"],
    ]


def test_scores_of_fewer_pictures_than_there_are_say_so(tmp_path: Path) -> None:
    run = painted_folder(tmp_path, rows=3)
    scored(run, {"merge": {"text_alignment": 0.3}, "switch": {"text_alignment": 0.3}})
    assert any("scores of 2 pictures of each method; 3 are painted" in part for part in Reader(render(run)).text)


def test_a_judgement_below_its_pictures_is_on_the_page(tmp_path: Path) -> None:
    run = painted_folder(tmp_path / "run")
    judged_folder(run / "judged")
    read = stands_alone(render(run))
    assert "judged" in read.text
    table = next(rows for rows in read.tables if rows[0][1:] == ["composition", "quality"])
    assert table[2:] == [
        ["merge", "7.50", "50\N{NO-BREAK SPACE}%", "4.00", "50\N{NO-BREAK SPACE}%"],
        ["switch", "6.25", "0\N{NO-BREAK SPACE}%", "4.50", "0\N{NO-BREAK SPACE}%"],
    ]
    versus = next(rows for rows in read.tables if rows[0][0] == "first / second")
    assert versus[1] == ["mergeswitch", "composition", "7.50", "5050", "6.25", "21 left out"]
    bars = [(a["class"], a["style"]) for tag, a in read.tags if tag == "i" and "width" in str(a.get("style"))]
    assert bars == 2 * [("wins", "width:50.0%"), ("ties", "width:50.0%")]
    assert {"5 with scores, 1 not usable", "2 of 3", "qwen2.5-vl"} <= set(read.text)
    assert any(part.startswith("-0.75 for the first; opposite winners in 50") for part in read.text)


def test_a_method_meets_all_others(tmp_path: Path) -> None:
    """Means and shares weigh every pair of pictures alike, and wins of the second are losses of the first."""
    judged_folder(tmp_path)
    found = json.loads((tmp_path / "judgement.json").read_text())
    (row,) = found["pairs"]
    of = {"a": 3.0, "b": 9.0, "wins": 0.0, "ties": 0.25, "losses": 0.75}
    found["pairs"].append(row | {"a": "average", "b": "merge", "counted": 6, "composition": of})
    nobody = dict.fromkeys(of)
    found["pairs"].append(row | {"a": "average", "b": "none", "counted": 0, "composition": nobody, "quality": nobody})
    write_json_atomic(tmp_path / "judgement.json", found)
    table = next(rows for rows in Reader(render(tmp_path)).tables if rows[0][1:] == ["composition", "quality"])
    means = {name: (mean, wins.replace("\N{NO-BREAK SPACE}", " ")) for name, mean, wins, *_ in table[2:]}
    # merge: (2 x 7.5 + 6 x 9) / 8, and (2 x 0.5 + 6 x 0.75) / 8.
    assert means["merge"] == ("8.62", "69 %")
    assert means["average"] == ("3.00", "0 %")
    assert means["none"] == ("–", "–")


def painted_image(place: Path, name: str = "sum") -> dict[str, Any]:
    pictures = []
    for number, (method, seed) in enumerate([(name, 4), ("switch", 4), (name, 5), ("switch", 5)]):
        Image.new("RGB", (8, 4), colour(number, 0)).save(place / f"{number}.png")
        pictures.append({"method": method, "seed": seed, "file": f"{number}.png", "seconds": 1.0})
    described = {
        "base": "sd",
        "pipeline": "P",
        "scheduler": "S",
        "experts": [{"name": "<i>hat</i>"}],
        "prompt": "a cat & a hat",
        "methods": {name: None, "switch": None},
        "pictures": pictures,
    }
    write_json_atomic(place / "image.json", described)
    return described


def test_one_prompt_by_several_methods(tmp_path: Path) -> None:
    described = painted_image(tmp_path)
    read = stands_alone(render(tmp_path))
    assert {"a cat & a hat", "<i>hat</i>"} <= set(read.text)
    assert [alt for alt, _ in shown(read)] == ["sum: seed 4", "switch: seed 4", "sum: seed 5", "switch: seed 5"]
    assert [picture.convert("RGB").getpixel((0, 0)) for _, picture in shown(read)] == [colour(n, 0) for n in range(4)]
    # A name, not a way out of the folder.
    (tmp_path / "run").mkdir()
    for picture in described["pictures"]:
        picture["file"] = f"../{picture['file']}"
    write_json_atomic(tmp_path / "run" / "image.json", described)
    with pytest.raises(LoraweaveError, match="cannot read the picture"):
        render(tmp_path / "run")


def test_the_demo_of_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "sheet.png")
    of = {"text": 0.5, "image": 0.75, "distinct": 0.9, "distinct_by_size": {"2": 1.0, "3": 0.8}, "seconds": 0.25}
    write_json_atomic(tmp_path / "results.json", {"summary": {"sum": of, "switch": of | {"text": 0.25}}})
    read = stands_alone(render(tmp_path))
    table = read.table("method")
    assert table["method"] == ["text", "image", "elements shown", "of 2", "of 3", "s/picture"]
    assert table["sum"] == ["0.500", "0.750", "90%", "100%", "80%", "0.25"]
    assert table["switch"][0] == "0.250"
    assert shown(read)[0][1].size == (40, 20)


@pytest.mark.parametrize("content", [b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n<script>", b""])
def test_what_is_no_picture_gets_into_no_page(tmp_path: Path, content: bytes) -> None:
    run = painted_folder(tmp_path)
    (run / "0-1.png").write_bytes(content)
    with pytest.raises(LoraweaveError, match=r"cannot read the picture .*0-1.png"):
        render(run)


def test_nothing_but_the_picture_gets_into_the_page(tmp_path: Path) -> None:
    run = painted_folder(tmp_path)
    (run / "0-1.png").write_bytes((run / "0-1.png").read_bytes() + b"<script>secret</script>")
    page = render(run)
    assert base64.b64encode(b"secret").decode()[:6] not in page
    assert len(shown(Reader(page))) == 4


def test_names_are_never_markup(tmp_path: Path) -> None:
    for number, evil in enumerate(EVIL):
        run = painted_folder(tmp_path / str(number), (evil, "switch"), prompt=evil)
        scored(
            run, {evil: {evil: 0.5, "a": 0.1}, "switch": {evil: 0.25}}, {"source": evil, "scores": {evil: {evil: 1.0}}}
        )
        judged_folder(run / "judged", evil)
        painted_image(run, evil)
        read = stands_alone(render(run))
        rows = [rows for rows in read.tables if any(row[0] == evil for row in rows)]
        assert len(rows) == 4, "scores, elements, published figures, the judge's means"
        heads = [rows for rows in read.tables if evil in rows[0]]
        assert len(heads) == 4, "scores, published figures, two contact sheets"
        assert f"{evil} 0" in read.text
        assert "49" not in read.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pictures.jsonl", "{", "pictures.jsonl"),
        ("pictures.jsonl", '{"id": "x"}', "'elements'"),
        ("alignment.json", "[]", "alignment.json: not what 'testbed' of this version writes"),
        ("judgement.json", '{"pairs": []}', "judgement.json: not what 'judge' of this version writes"),
        ("image.json", '{"pictures": [1]}', "image.json: not what 'image' of this version writes"),
    ],
)
def test_what_cannot_be_reported_is_said(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraweaveError, match=said):
        render(tmp_path)
