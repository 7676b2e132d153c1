"""The report says what the files say, stands by itself, and no name in it becomes markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import against_best_rival
from loraweave.evaluation.cells import Cell, Cells, Cost
from loraweave.evaluation.comparison import Run, costs, single, summarise
from loraweave.files import write_json_atomic
from loraweave.reporting.charts import HEIGHT, WIDTH, Line, line_chart, nice_ticks
from loraweave.reporting.page import render, write_report

VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }}",
    "</style><b>",
    "a&amp;b'\"",
    "</title>",
]


class Reader(HTMLParser):
    """Notes tags and text; insists that every tag that opens is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


def cell(method: str, seed: int | None, qa: list[float], nli: list[float], site: str = "block.0") -> Cell:
    history: list[dict[str, float]] = []
    if seed is not None:
        for step in (1, 10, 20):
            record = {"step": step, "task_loss": 3.0 / step, "entropy": 0.6, "load/x": 0.5, "load/y": 0.5}
            history.append(record | {f"entropy/{site}": 0.6, "entropy/block.1": 0.1})
        history.append({"step": 20, "train_loss": 1.0})
    scores = {"qa": sum(qa) / len(qa), "nli": sum(nli) / len(nli)}
    cost = Cost(2.5, 20, 480, 0.4, 0.7) if seed is not None else Cost(score_seconds=0.2, peak_memory_gb=0.5)
    return Cell(method, seed, {"method": method}, scores, {"qa": qa, "nli": nli}, cost, history)


def run_folder(place: Path, experts: int = 2, names: tuple[str, str, str] = ("mole", "qa", "block.0")) -> Path:
    """What compare leaves behind, worked out from made-up items by the code that it uses."""
    mole, expert, site = names
    own = {"qa": 100.0, "nli": 50.0}
    cells = [
        cell("base", None, [0, 0], [0, 0]),
        cell(single(expert), None, [100, 100], [0, 0]),
        cell(single("nli"), None, [0, 0], [100, 0]),
        cell("sum", None, [100, 0], [0, 0]),
        cell(mole, 0, [100, 100], [100, 0], site),
        cell(mole, 1, [100, 0], [100, 0], site),
    ]
    store = Cells(place / "cells")
    for one in cells:
        store.save(one)
    extra = {
        "metrics": {"qa": "exact_match", "nli": "accuracy"},
        "items": {"qa": 2, "nli": 2},
        "recipe": {"base": "zoo", "experts": {expert: "loras/x", **{f"e{n}": "y" for n in range(experts - 1)}}},
        "kept": mole,
        "costs": costs(cells),
        "cells": [store.path(one.method, one.seed, one.key).name for one in cells],
    }
    results = summarise([Run(c.method, c.scores, c.seed, c.seconds) for c in cells], own, extra=extra)
    items: dict[str, Any] = {}
    for one in cells:
        if not one.method.startswith("only:"):
            items.setdefault(one.method, []).append(one.items)
    kept = {method: found["mean"] for method, found in results["retention"].items()}
    write_json_atomic(place / "results.json", results | {"differences": against_best_rival(items, own, kept)})
    panels = {task: {site: [0.75, 0.25], "block.1": [-0.5, 1.0]} for task in (expert, "nli")}
    write_json_atomic(place / "weights.json", {"method": mole, "experts": [expert, "nli"], "panels": panels})
    return place


def stands_alone(page: str) -> Reader:
    """Nothing outside is referred to, and nothing runs."""
    read = Reader(page)
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert str(value).startswith("data:image/png;base64,")
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return read


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
    best = [a for t, a in Reader(page).tags if t == "td" and "best" in str(a.get("class"))]
    assert not best, "of two items nobody is best"
    assert not [a for t, a in Reader(page).tags if t == "span" and str(a.get("class")).endswith((" up", " down"))]


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
    page = render(tmp_path)
    text = stands_alone(page).text
    assert "Retention by number of experts" in text
    assert [part for part in text if re.fullmatch(r"n\d+", part)] == ["n2", "n32", "n8"]
    shutil.rmtree(tmp_path / "n8")
    run_folder(tmp_path / "again", 2)
    assert "Retention by number of experts" not in render(tmp_path), "two runs of one size are no curve"


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


def test_pictures_stand_in_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "sheet.png")
    described = {
        "base": "sd",
        "pipeline": "P",
        "scheduler": "S",
        "experts": [{"name": "<i>hat</i>"}],
        "prompt": "a cat & a hat",
        "methods": {"sum": None},
        "pictures": [{"method": "sum", "seed": 0, "file": "sum-0.png", "seconds": 1.0}],
    }
    write_json_atomic(tmp_path / "image.json", described)
    read = stands_alone(render(tmp_path))
    assert {"a cat & a hat", "<i>hat</i>"} <= set(read.text)
    (source,) = [a["src"] for t, a in read.tags if t == "img"]
    assert source is not None
    (tmp_path / "sheet.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(LoraweaveError, match="expected the contact sheet, a PNG"):
        render(tmp_path)


def test_what_cannot_be_reported_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoraweaveError, match="no such folder"):
        render(tmp_path / "none")
    with pytest.raises(LoraweaveError, match="nothing to report"):
        render(tmp_path)
    run = run_folder(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    for broken, why in (
        ("{", "cannot be read"),
        ("[]", "not what 'compare' or 'image' of this version writes"),
        (json.dumps({k: v for k, v in results.items() if k != "cells"}), "KeyError: 'cells'"),
        (json.dumps({k: v for k, v in results.items() if k != "costs"}), "expected 'costs'.* earlier version"),
    ):
        (run / "results.json").write_text(broken)
        with pytest.raises(LoraweaveError, match=why):
            write_report(run)
    assert not (run / "report.html").exists()


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


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 2.08, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (1, 20, [0.0, 5.0, 10.0, 15.0, 20.0]),
        (-3, 3, [-4.0, -2.0, 0.0, 2.0, 4.0]),
        (5.0, 5.0, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    if low < high:
        assert found == pytest.approx(ticks)


def test_points_stand_where_they_belong() -> None:
    """Plot area: 46 to 408 across, 212 down to 12."""
    assert (WIDTH, HEIGHT) == (420, 250)
    chart = line_chart([Line("a<b", [(0, 0.0), (5, 1.0), (10, 0.5)], "red", spread=[0, 0, 0])], "x", "y")
    assert "M46.0 212.0L227.0 12.0L408.0 112.0" in chart
    assert "a&lt;b" in chart
    doubled = line_chart([Line("n", [(2, 0.0), (8, 1.0), (32, 1.0)], "red")], "x", "y", logarithmic=True)
    assert "M46.0 212.0L227.0 12.0L408.0 12.0" in doubled


# ---------------------------------------------------------------- a browser


def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here; on Debian and Ubuntu: apt-get install chromium")
    page = write_report(run_folder(tmp_path / "run", names=("mole", EVIL[0], EVIL[1])))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [browser, *flags, profile, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert Reader(page.read_text()).text == Reader(done.stdout).text
    assert done.stdout.count("<svg") == 2
    shot = tmp_path / "shot.png"
    sized = [f"--screenshot={shot}", "--window-size=800,900", "--hide-scrollbars"]
    subprocess.run([browser, *flags, profile, *sized, page.as_uri()], capture_output=True, timeout=120, check=True)
    assert len(set(Image.open(shot).convert("RGB").resize((80, 90)).tobytes())) > 30, "the page is blank"
