"""Heat maps of a page: rows are experts, columns are sites, and each method has its own."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import EVIL, Reader, run_folder, stands_alone

from loraweave.errors import LoraweaveError
from loraweave.files import write_json_atomic
from loraweave.reporting.page import render


def page(place: Path, weights: Any) -> str:
    run_folder(place)
    write_json_atomic(place / "weights.json", weights)
    return render(place)


def of_methods(experts: list[str], **methods: Any) -> dict[str, Any]:
    return {
        "method": next(iter(methods)),
        "experts": experts,
        "methods": {method: {"cell": None, "panels": panels} for method, panels in methods.items()},
    }


SITES = {"block.0": [0.25, -0.5, 0.75], "block.1": [1.0, 0.0, 0.5]}
OTHER = {"block.0": [0.0, 0.0, 1.0], "block.1": [0.0, 1.0, 0.0]}


def reader(page: str) -> Reader:
    """Of the section with the maps."""
    start = page.index("<section>\n<h3>What the gates give")
    return Reader(page[start : page.index("</section>", start)] + "</section>")


def test_rows_are_experts_and_columns_are_sites(tmp_path: Path) -> None:
    read = reader(page(tmp_path, of_methods(["qa", "nli", "x"], mole={"qa": SITES, "nli": OTHER})))
    qa, nli = read.tables
    assert qa == [["", "0", "1"], ["qa", ".25", "1.00"], ["nli", "-.50", ".00"], ["x", ".75", ".50"]]
    assert nli == [["", "0", "1"], ["qa", ".00", ".00"], ["nli", ".00", "1.00"], ["x", "1.00", ".00"]]
    cells = [attributes for tag, attributes in read.tags if tag == "td"]
    assert [(c["title"], c["style"]) for c in cells[:4]] == [
        ("block.0: 0.25", "--w:25"),
        ("block.1: 1.00", "--w:100"),
        ("block.0: -0.50", "--w:50"),
        ("block.1: 0.00", "--w:0"),
    ]
    assert [n for n, c in enumerate(cells) if "minus" in str(c["class"])] == [2]
    # The row of the expert that a task is named after is framed.
    framed = [attributes.get("class") for tag, attributes in read.tags if tag == "tr"]
    assert framed == [None, "self", None, None, None, None, "self", None]


def test_every_method_has_its_own_the_kept_one_first(tmp_path: Path) -> None:
    first = of_methods(["qa", "nli", "x"], mole={"qa": SITES, "nli": OTHER}, cat={"qa": OTHER, "nli": OTHER})
    read = reader(page(tmp_path, {**first, "method": "cat"}))
    assert [part for part in read.text if part.startswith("What ")][1:] == [
        "What cat gives to each expert",
        "What mole gives to each expert",
    ]
    # One map where every task gets the same.
    assert len(read.tables) == 3
    assert read.tables[0][3] == ["x", "1.00", ".00"]
    assert read.tables[1][3] == ["x", ".75", ".50"]
    assert "every task" in read.text


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'<div class="cells"><img src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def test_large_maps_are_pictures_with_a_pixel_per_cell(tmp_path: Path) -> None:
    experts = [f"e{n}" for n in range(40)]
    sites = {f"block.{s}": [0.0] * 40 for s in range(60)}
    sites["block.2"][7], sites["block.59"][0] = 0.5, -1.0
    other = {site: weights[::-1] for site, weights in sites.items()}
    made = page(tmp_path, of_methods(experts, mole={"e7": sites, "nli": other}))
    assert len(made) < 60_000
    first, second = pictures(made)
    assert first.size == (60, 40)
    assert first.getpixel((2, 7)) == (13, 125, 119, 128)
    assert first.getpixel((59, 0)) == (179, 84, 30, 255)
    assert sum(map(bool, first.getchannel("A").tobytes())) == 2
    assert second.getpixel((2, 32)) == (13, 125, 119, 128)
    assert re.findall(r'--row:(\d+)"', made) == ["7"]
    stands_alone(made)


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    earlier = {"method": "mole", "experts": ["qa", "nli", "x"], "panels": {"qa": SITES, "nli": OTHER}}
    assert len(reader(page(tmp_path, earlier)).tables) == 2


def test_names_are_never_markup(tmp_path: Path) -> None:
    for number, evil in enumerate(EVIL):
        other = EVIL[(number + 1) % len(EVIL)]
        panels = {evil: {other: [1.0, 0.0], "b": [0.0, 1.0]}, "nli": {other: [0.0, 1.0], "b": [0.0, 1.0]}}
        made = page(tmp_path / str(number), of_methods([evil, other], **{other: panels}))
        text = stands_alone(made).text
        assert f"What {other} gives to each expert" in text
        assert evil in text


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ({"block.0": [1.0]}, r"a site has other than 2 weights"),
        ({"block.0": [float("nan"), 1.0]}, "a weight is not finite"),
        ({"block.0": ["<b>", 1.0]}, "could not convert"),
    ],
)
def test_weights_that_make_no_sense_are_refused(tmp_path: Path, sites: Any, said: str) -> None:
    run_folder(tmp_path)
    (tmp_path / "weights.json").write_text(json.dumps(of_methods(["qa", "nli"], mole={"qa": sites, "nli": sites})))
    with pytest.raises(LoraweaveError, match=rf"not what 'compare' .*{said}"):
        render(tmp_path)
