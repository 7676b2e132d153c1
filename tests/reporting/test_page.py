"""The report says what the files say, stands by itself, and no name in it becomes markup."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from report_runs import EVIL, Reader, cell, run_folder, stands_alone

from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.evaluation.cells import Cells
from loraweave.files import write_json_atomic
from loraweave.reporting.page import render, write_report


def test_the_page_says_what_the_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    text = stands_alone(page).text
    # mole: seeds keep (100/100 + 50/50) / 2 = 1 and (50/100 + 50/50) / 2 = 0.75.
    assert "0.875 ± 0.177" in text
    # Its rival is sum, with (50/100 + 0) / 2; the difference is 0.875 - 0.25.
    assert any(part.startswith("+0.62 [") for part in text)
    assert "What mole gives to each expert" in text
    assert {"0.250", ".75", "-.50", "1.00", "20"} <= set(text)
    assert [a["title"] for t, a in Reader(page).tags if t == "th" and "accuracy" in str(a.get("title"))] == [
        "accuracy, 2 items"
    ]
    titles = [
        text[n] for n in range(len(text)) if text[n] in ("all experts alike", "mean over sites, run 1", "block.1")
    ]
    assert {"all experts alike", "mean over sites, run 1", "block.1"} == set(titles)
    # Two experts alike have the entropy ln 2, in a plot from 0 to 0.8.
    (even,) = re.findall(r'stroke-dasharray="4 4" d="M46.0 ([0-9.]+)L408.0 \1"', page)
    assert (212 - float(even)) / 200 * 0.8 == pytest.approx(math.log(2), abs=1e-3)
    best = [a for t, a in Reader(page).tags if t == "td" and "best" in str(a.get("class"))]
    assert not best, "of two items nobody is best"
    assert not [a for t, a in Reader(page).tags if t == "span" and str(a.get("class")).endswith((" up", " down"))]
    scores = stands_alone(page).table("method", 1)
    assert scores["method"][1:] == ["qa", "nli"]
    assert scores["mole"] == ["0.875 ±0.177", "75.0 ±35.4", "50.0 ±0.0"]
    assert scores["only:qa"] == ["0.500", "100.0", "0.0"]
    assert scores["each expert alone"] == ["1.000", "100.0", "50.0"]


def test_the_best_and_what_is_sure_where_there_are_enough_items(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    found = json.loads((run / "results.json").read_text())
    found["items"], found["per_task"] = {"qa": 6, "nli": 5}, ["mole"]
    found["differences"]["mole"]["clear"] = True
    (run / "results.json").write_text(json.dumps(found))
    page = render(run)
    tags = Reader(page).tags
    # Of qa alone: mole.
    assert len([a for t, a in tags if t == "td" and "best" in str(a.get("class"))]) == 1
    assert [a["class"] for t, a in tags if t == "span" and str(a.get("class")).startswith("interval ")] == [
        "interval up"
    ]
    assert "Learned anew for each task, from its examples alone: mole." in Reader(page).text


def test_names_are_never_markup(tmp_path: Path) -> None:
    for number, evil in enumerate(EVIL):
        other = EVIL[(number + 1) % len(EVIL)]
        run = run_folder(tmp_path / str(number), names=(evil, other, EVIL[(number + 2) % len(EVIL)]))
        text = stands_alone(render(run)).text
        assert f"What {evil} gives to each expert" in text
        assert other in text
        assert "49" not in text


def test_runs_of_several_sizes_make_a_curve(tmp_path: Path) -> None:
    for experts in (2, 8, 32):
        run_folder(tmp_path / f"n{experts}", experts)
    faded = json.loads((tmp_path / "n32" / "results.json").read_text())
    faded["retention"]["mole"] |= {"mean": 0.5, "std": 0.25}
    write_json_atomic(tmp_path / "n32" / "results.json", faded)
    page = render(tmp_path)
    retention = Reader(page).table("experts")
    assert retention["experts"] == ["2", "8", "32"]
    assert retention["mole"] == ["0.875", "0.875", "0.500"]
    assert "mole: 0.5 at 32" in page
    # From 0 to 1.2 in 200 units: 0.875 and 0.5 with their deviations above, then below.
    band = re.findall(r'class="band" [^>]*d="M([^"]*)Z"', page)[-1]
    heights = [float(point.split()[1]) for point in band.split("L")]
    above, below = 0.875 + 0.1768, 0.875 - 0.1768
    values = [(212 - height) / 200 * 1.25 for height in heights]
    assert values == pytest.approx([above, above, 0.75, 0.25, below, below], abs=2e-3)
    text = stands_alone(page).text
    assert "Retention by number of experts" in text
    # Links to the runs, then their titles.
    assert [part for part in text if re.fullmatch(r"n\d+", part)] == 2 * ["n2", "n8", "n32"]
    shutil.rmtree(tmp_path / "n8")
    run_folder(tmp_path / "again", 2)
    assert "Retention by number of experts" not in render(tmp_path), "two runs of one size are no curve"


def test_names_are_no_markup_beside_the_curve_either(tmp_path: Path) -> None:
    for number, evil in enumerate(EVIL):
        for experts in (2, 8):
            run_folder(tmp_path / str(number) / f"n{experts}", experts, names=(evil, "qa", "block.0"))
        assert Reader(render(tmp_path / str(number))).table("experts")[evil] == ["0.875", "0.875"]


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    results = json.loads((run / "results.json").read_text())
    printed = {"sum": {"qa": 11.0, "other": 12.0}, "mole": {"nli": 21.0, "average": 22.0}}
    results["recipe"]["published"] = {"source": "Paper <1>", "scores": printed, "note": "a & b"}
    write_json_atomic(run / "results.json", results)
    read = stands_alone(render(run))
    pairs = {
        first: rest for first, *rest in next(rows for rows in read.tables if rows[1][1:3] == ["paper", "here"])[2:]
    }
    assert any(part.startswith("Paper <1> (a & b). In each pair") for part in read.text)
    # qa, other, nli, average: of each the paper's figure, then ours.
    assert pairs["sum"] == ["11.0", "50.0", "12.0", "–", "–", "0.0", "–", "25.0"]
    assert pairs["mole"] == ["–", "75.0", "–", "–", "21.0", "50.0", "22.0", "62.5"]


def test_many_columns_of_published_figures_are_rows(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    results = json.loads((run / "results.json").read_text())
    printed = {"sum": {"nli": 31.0, **{f"t{n}": float(n) for n in range(5)}}, "mole": {"nli": 21.0}}
    results["recipe"]["published"] = {"source": "Paper", "scores": printed}
    write_json_atomic(run / "results.json", results)
    rows = next(rows for rows in Reader(render(run)).tables if rows[1][1:3] == ["paper", "here"])
    assert rows[0] == ["", "sum", "mole"]
    found = {first: rest for first, *rest in rows[2:]}
    assert found["nli"] == ["31.0", "0.0", "21.0", "50.0"]
    assert found["t4"] == ["4.0", "–", "–", "–"]


def test_marks_of_intervals_stand_where_they_belong(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    results = json.loads((run / "results.json").read_text())
    results["differences"] = {
        "mole": {"rival": "sum", "difference": 0.2, "low": 0.1, "high": 0.4, "clear": True},
        "sum": {"rival": "mole", "difference": -0.2, "low": -0.4, "high": -0.1, "clear": True},
        "base": {"rival": "mole", "difference": 0.0, "low": -0.2, "high": 0.2},
    }
    write_json_atomic(run / "results.json", results)
    read = Reader(render(run))
    spans = [a for t, a in read.tags if t == "span" and "interval" in str(a.get("class"))]
    marks = [a["style"] for t, a in read.tags if t == "i" and a.get("class") in ("span", "dot")]
    assert [(a["class"], a["title"]) for a in spans] == [
        ("interval up", "against sum"),
        ("interval down", "against mole"),
        ("interval", "against mole"),
    ]
    # 0 is in the middle; the widest difference, 0.4, reaches to the edge.
    assert marks[:2] == ["left:62.5%;right:0.0%", "left:75.0%"]
    assert marks[2:4] == ["left:0.0%;right:62.5%", "left:25.0%"]
    assert marks[4:] == ["left:25.0%;right:25.0%", "left:50.0%"]
    lead = "mole keeps 87.5 % of what the LoRAs can do by themselves, 20.0 points more than sum (95 %: +10.0 to +40.0)."
    assert lead in read.text


def test_cells_of_an_earlier_recipe_are_not_shown(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    before = render(run)
    Cells(run / "cells").save(cell("stranger", 0, [1.0], [1.0]))
    assert render(run) == before


def test_many_single_experts_are_left_out_but_for_those_that_lead(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    for n in range(20):
        for part in ("scores", "retention"):
            results[part][f"only:x{n}"] = results[part]["base"]
    (run / "results.json").write_text(json.dumps(results))
    text = Reader(render(run)).text
    assert {part for part in text if part.startswith("only:")} == {"only:qa", "only:nli"}
    assert any("The 20 single experts" in part for part in text)


def test_what_cannot_be_reported_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoraweaveError, match="no such folder"):
        render(tmp_path / "none")
    with pytest.raises(LoraweaveError, match="nothing to report"):
        render(tmp_path)
    run = run_folder(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    for broken, why in (
        ("{", "cannot be read"),
        ("[]", "not what 'compare' of this version writes"),
        (json.dumps({k: v for k, v in results.items() if k != "cells"}), "KeyError: 'cells'"),
        (json.dumps({k: v for k, v in results.items() if k != "costs"}), "expected 'costs'.* earlier version"),
    ):
        (run / "results.json").write_text(broken)
        with pytest.raises(LoraweaveError, match=why):
            write_report(run)
    assert not (run / "report.html").exists()


def test_damage_beside_the_results_is_said_too(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    weights = json.loads((run / "weights.json").read_text())
    panels = weights["panels"]
    (run / "weights.json").write_text(json.dumps(weights | {"panels": panels | {"nli": {}}}))
    with pytest.raises(LoraweaveError, match=r"panels of .* have different sites"):
        render(run)
    (run / "weights.json").write_text(json.dumps(weights))
    path = next(path for path in (run / "cells").glob("*.json") if '"step"' in path.read_text())
    path.write_text(re.sub(r'"step": [0-9.]+', '"step": 1e400', path.read_text()))
    with pytest.raises(LoraweaveError, match="OverflowError: cannot convert"):
        render(run)


def test_cells_are_read_from_the_run_alone(tmp_path: Path) -> None:
    """Names of cells come from a file; they must not lead out of the folder."""
    run = run_folder(tmp_path / "run")
    assert "<h3>Training" in render(run)
    Cells(tmp_path / "elsewhere").save(cell("mole", 0, [1.0], [1.0]))
    next((tmp_path / "elsewhere").glob("*.json")).rename(tmp_path / "elsewhere" / "other.json")
    results = json.loads((run / "results.json").read_text())
    results["cells"] = ["../../elsewhere/other.json", str(tmp_path / "elsewhere" / "other.json")]
    (run / "results.json").write_text(json.dumps(results))
    assert "<h3>Training" not in render(run)
