"""Parts with pictures: what ``loraweave testbed``, ``image`` and ``demo --images`` leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraweave.evaluation.data import read_rows
from loraweave.evaluation.judges.pictures import read_pictures
from loraweave.reporting.parts.pictures import sheet, whole_sheet
from loraweave.reporting.parts.published import figures, measure

PICTURES, SCORES, SETTINGS = "pictures.jsonl", "alignment.json", "testbed.json"
IMAGE, SHEET = "image.json", "sheet.png"


def testbed(folder: Path, scores: Any, settings: Any, most: int) -> dict[str, Any]:
    """The part about a test bed.

    Args:
        folder: with ``pictures.jsonl``, or at least scores.
        scores: the content of ``alignment.json``; None where nothing was scored.
        settings: the content of ``testbed.json``; None where pictures are somebody else's.
        most: pictures to show.

    Raises:
        LoraweaveError: the list of pictures or a picture cannot be read.
    """
    path = folder / PICTURES
    rows = read_pictures(path) if path.is_file() else []
    said = {row["id"]: row for _, row in read_rows(path)} if rows else {}
    columns = list(dict.fromkeys(method for row in rows for method in row.pictures))
    captions = [str(said[row.id].get("prompt") or ", ".join(e.name for e in row.elements)) for row in rows]
    if len({said[row.id].get("seed") for row in rows}) > 1:
        captions = [f"{caption}; seed {said[row.id].get('seed')}" for caption, row in zip(captions, rows, strict=True)]
    return {
        "template": "testbed.html.j2",
        "scores": None if scores is None else _scores(scores),
        "elements": None if scores is None else _elements(scores["distinctness"]),
        "published": None if scores is None else figures(scores),
        "sheet": sheet([(c, row.pictures) for c, row in zip(captions, rows, strict=True)], columns, most),
        "painted": len(rows),
        "scored": None if scores is None else scores["pictures"],
        "facts": _facts(rows, columns, scores, settings),
        "recipe": _dumped(settings if scores is None else scores["recipe"]),
    }


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """Methods by measures; the best of each is marked, as shown (with three digits), unless all are alike."""
    table = {method: dict(scores) for method, scores in found["scores"].items()}
    for method, of in found["distinctness"].items():
        table[method] |= {"distinctness": of["mean"], "all": of["all"]}
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    costs = {method: float(of["train_seconds"]) for method, of in (found.get("costs") or {}).items()}
    rows = []
    for method, scores in table.items():
        cells = []
        for name in names:
            all_of = {round(float(of[name]), 3) for of in table.values() if name in of}
            value = float(scores[name]) if name in scores else None
            mark = value is not None and len(all_of) > 1 and round(value, 3) == max(all_of)
            cells.append({"value": None if value is None else f"{value:.3f}", "best": mark})
        rows.append({"name": method, "cells": cells, "seconds": costs.get(method)})
    return {"head": [measure(name) for name in names], "rows": rows, "costs": bool(costs)}


def _elements(distinct: Mapping[str, Any]) -> dict[str, Any] | None:
    """Methods by elements: in which share of the pictures that should show it each one appears."""
    if not distinct:
        return None
    names = list(dict.fromkeys(name for of in distinct.values() for name in of["concepts"]))
    rows = [
        (m, [None if n not in of["concepts"] else float(of["concepts"][n]) for n in names])
        for m, of in distinct.items()
    ]
    return {"names": names, "rows": rows}


def _facts(rows: Sequence[Any], methods: Sequence[str], scores: Any, settings: Any) -> list[tuple[str, str]]:
    facts = []
    if settings is not None:
        bed = settings["testbed"]
        facts += [
            ("base", str(settings["base"])),
            ("experts", ", ".join(settings["experts"])),
            ("painted with", _painting(bed)),
        ]
    if rows:
        facts += [
            ("pictures", f"{sum(len(row.pictures) for row in rows)}, {len(rows)} of each of {len(methods)} methods")
        ]
    if scores is not None:
        facts += [("scored by", " and ".join(str(scores[model]) for model in ("clip", "dino") if scores[model]))]
    return facts


def _painting(bed: Mapping[str, Any]) -> str:
    size = "" if bed.get("size") is None else f"{bed['size'][0]} x {bed['size'][1]} pixels"
    guidance = "" if bed.get("guidance") is None else f"guidance {bed['guidance']:g}"
    parts = [f"{bed['steps']} steps", str(bed.get("scheduler") or ""), guidance, size]
    return ", ".join(part for part in parts if part)


def image(folder: Path, described: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The part about one prompt, painted by several methods with several seeds.

    Raises:
        LoraweaveError: a picture cannot be read.
    """
    rows: dict[Any, dict[str, Path]] = {}
    for entry in described["pictures"]:
        # A name, not a way: it must not lead out of the folder.
        rows.setdefault(entry["seed"], {})[entry["method"]] = folder / Path(entry["file"]).name
    facts = [
        ("prompt", described["prompt"]),
        ("base", f"{described['base']} ({described['pipeline']}, {described['scheduler']})"),
        ("experts", ", ".join(expert["name"] for expert in described["experts"])),
    ]
    return {
        "template": "image.html.j2",
        "sheet": sheet([(f"seed {seed}", files) for seed, files in rows.items()], list(described["methods"]), most),
        "facts": [(name, str(value)) for name, value in facts],
    }


def demo(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The part about what ``loraweave demo --images`` leaves: its sheet and its table.

    Raises:
        LoraweaveError: the sheet cannot be read.
    """
    summary = results["summary"]
    sizes = list(next(iter(summary.values()))["distinct_by_size"])
    rows = []
    for method, of in summary.items():
        shares = [of["distinct"], *(of["distinct_by_size"][size] for size in sizes)]
        cells = [f"{of['text']:.3f}", f"{of['image']:.3f}", *(f"{share:.0%}" for share in shares)]
        rows.append((method, [*cells, f"{of['seconds']:.2f}"]))
    return {
        "template": "demo.html.j2",
        "head": ["text", "image", "elements shown", *(f"of {size}" for size in sizes), "s/picture"],
        "rows": rows,
        "picture": whole_sheet(folder / SHEET),
    }


def _dumped(content: Any) -> str | None:
    return None if content is None else json.dumps(content, indent=2, ensure_ascii=False)
