"""Runs to report on, and a reader of pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from loraweave.evaluation.bootstrap import against_best_rival
from loraweave.evaluation.cells import Cell, Cells, Cost
from loraweave.evaluation.comparison import Run, costs, single, summarise
from loraweave.files import write_json_atomic, write_text_atomic

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
    """Notes tags, text and the cells of tables; insists that every tag that opens is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if data.strip():
            self.text.append(data.strip())

    def table(self, corner: str, number: int = 0) -> dict[str, list[str]]:
        """Of the tables that begin with that cell, one as first cell of a row -> the other cells."""
        found = [rows for rows in self.tables if rows[0][0] == corner][number]
        return {first.strip(): [cell.strip().replace("\xa0", " ") for cell in rest] for first, *rest in found}


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


def painted_folder(
    place: Path,
    methods: Sequence[str] = ("merge", "switch"),
    rows: int = 2,
    side: int = 8,
    prompt: str = "a hero, a coat",
    seeds: bool = False,
) -> Path:
    """What testbed leaves behind; every picture has a colour of its own, ``colour(row, method number)``."""
    lines = []
    for row in range(rows):
        files = {}
        for number, method in enumerate(methods):
            files[method] = f"{row}-{number}.png"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), colour(row, number)).save(place / files[method])
        said = {"id": f"set{row}", "set": "hero+coat", "prompt": f"{prompt} {row}", "elements": ["hero", "coat"]}
        lines.append(json.dumps(said | {"seed": row if seeds else 0, "pictures": files}))
    write_text_atomic(place / "pictures.jsonl", "\n".join(lines) + "\n")
    return place


def colour(row: int, column: int) -> tuple[int, int, int]:
    return 10 + 20 * row, 200 - 20 * column, 30


def scored(place: Path, scores: Mapping[str, Mapping[str, float]], published: Any = None) -> None:
    """``alignment.json`` beside the pictures; of each method's two elements, hero appears always and coat never."""
    recipe = {"base": "sd", **({} if published is None else {"published": published})}
    distinct = {
        method: {"mean": 0.5 + 0.1 * number, "all": 0.25, "concepts": {"hero": 1.0, "coat": 0.0}}
        for number, method in enumerate(scores)
    }
    found = {"scores": scores, "distinctness": distinct, "pictures": 2, "clip": "clip-l", "dino": None}
    write_json_atomic(place / "alignment.json", found | {"recipe": recipe})


def judged_folder(place: Path, a: str = "merge", b: str = "switch") -> Path:
    """What judge leaves behind: two pairs that count and one that does not; ``a`` wins one and ties in the other."""
    of = {"a": 7.5, "b": 6.25, "wins": 0.5, "ties": 0.5, "losses": 0.0}
    row = {"a": a, "b": b, "counted": 2, "left_out": 1, "composition": of, "quality": of | {"a": 4.0, "b": 4.5}}
    position = {name: {"bias": -0.75, "flips": 0.5} for name in ("composition", "quality")}
    counted = {"pairs": [row], "position": position, "answered": 5, "failed": 1, "open": 0}
    write_json_atomic(place / "judgement.json", counted | {"model": "qwen2.5-vl", "url": "http://localhost/v1"})
    return place


def stands_alone(page: str) -> Reader:
    """Nothing outside is referred to, and nothing runs."""
    read = Reader(page)
    ids = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if tag == "a" and name == "href":
                assert str(value).removeprefix("#") in ids, f"{value} leads nowhere"
            elif name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert str(value).startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return read
