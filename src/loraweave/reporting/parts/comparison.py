"""The part of a comparison: what ``loraweave compare`` and ``demo`` leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraweave.evaluation.comparison import SINGLE
from loraweave.reporting.parts.curves import training
from loraweave.reporting.parts.heat import heat_maps
from loraweave.reporting.parts.published import figures
from loraweave.reporting.tables import BEST, SUMMARY, enough, note, summary_rows

RESULTS, WEIGHTS = "results.json", "weights.json"
# More single experts than this are not all shown.
_SINGLES = 12
Results = Mapping[str, Any]


def comparison(folder: Path, results: Results, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The part about ``results.json`` and the files beside it, which ``read`` reads (None where one is missing)."""
    recipe = results["recipe"]
    scores, weights = _scores(results), read(folder / WEIGHTS)
    shown = _few(scores)
    cells = [cell for name in results["cells"] if (cell := read(folder / "cells" / Path(name).name)) is not None]
    return {
        "template": "comparison.html.j2",
        "results": results,
        "experts": len(recipe["experts"]) + len(recipe.get("merged") or {}),
        "retention": results["retention"],
        "facts": _facts(results),
        "lead": _lead(results),
        "summary": _summary(results),
        "note": note(results),
        "tasks": list(results["metrics"]),
        "scores": shown,
        "hidden": len(scores) - len(shown),
        "published": figures(results),
        "heat": [] if weights is None else heat_maps(weights),
        "training": [curves for method in results["scores"] if (curves := training(method, cells)) is not None],
        "recipe": json.dumps(recipe, indent=2, ensure_ascii=False),
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    recipe, machine, versions = results["recipe"], results["machine"], results["versions"]
    memory = results["peak_gpu_memory_gb"] or results["peak_memory_gb"]
    spent = f"{results['seconds']:.0f} s" if results["seconds"] < 300 else f"{results['seconds'] / 60:.0f} min"
    return [
        ("base", str(recipe["base"])),
        ("experts", ", ".join([*recipe["experts"], *(recipe.get("merged") or {})])),
        ("seeds", ", ".join(map(str, results["seeds"])) or "none: nothing here hangs on chance"),
        ("test items", f"{sum(results['items'].values())} in {len(results['items'])} tasks"),
        ("made on", f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores"),
        ("took", spent + ("" if memory is None else f", {memory:.2f} GB at most")),
        ("with", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]


def _lead(results: Results) -> str | None:
    """The outcome in a sentence; None where nobody competes."""
    best = summary_rows(results)[0][0]
    found = results["differences"].get(best)
    if found is None:
        return None
    kept = f"{best} keeps {100 * results['retention'][best]['mean']:.1f} % of what the LoRAs can do by themselves"
    points, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    ahead = f"{points:.1f} points more than {found['rival']} (95 %: {low:+.1f} to {high:+.1f})"
    if _sure(summary_rows(results)[0]):
        return f"{kept}, {ahead}."
    return f"{kept}. That is {ahead}: too little to tell the two apart on these items and seeds."


def _sure(row: Sequence[str]) -> bool:
    """Whether the table has a star there."""
    return row[1 + SUMMARY.index("to best rival")].endswith(BEST)


def _summary(results: Results) -> dict[str, Any]:
    """Rows of the summary, and where the marks of the intervals stand, in percent of the widest difference."""
    found, rows = results["differences"], summary_rows(results)
    reach = max((max(abs(d["low"]), abs(d["high"])) for d in found.values()), default=0.0) or 1.0

    def place(value: float) -> float:
        return round(50 + 50 * value / reach, 2)

    marks = {
        method: {"rival": d["rival"], **{name: place(d[name]) for name in ("low", "difference", "high")}}
        for method, d in found.items()
    }
    return {"head": SUMMARY, "rows": rows, "marks": marks, "sure": {row[0]: _sure(row) for row in rows}}


def _scores(results: Results) -> list[dict[str, Any]]:
    """A row per method: competitors, then single experts, then each expert alone."""
    scores, kept, tasks = results["scores"], results["retention"], list(results["metrics"])
    competing = [method for method in scores if not method.startswith(SINGLE)]
    rows = []
    for method in sorted(scores, key=lambda method: method not in competing):
        cells = []
        for task in tasks:
            best = max(round(scores[m][task]["mean"], 1) for m in competing)
            mean = scores[method][task]["mean"]
            spread = scores[method][task]["std"] if len(scores[method][task]["per_seed"]) > 1 else None
            mark = method in competing and len(competing) > 1 and round(mean, 1) == best and enough(results, task)
            cells.append(
                {"mean": f"{mean:.1f}", "std": None if spread is None else f"{spread:.1f}", "best": mark, "share": mean}
            )
        rows.append({"name": method, "single": method not in competing, "cells": cells, "kept": kept[method]})
    return rows


def _few(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without single experts where there are many, but for those with the highest score on some task."""
    single = [row for row in rows if row["single"]]
    if len(single) <= _SINGLES:
        return list(rows)
    leaders = {
        max(range(len(single)), key=lambda n: single[n]["cells"][task]["share"])
        for task in range(len(rows[0]["cells"]))
    }
    return [*(row for row in rows if not row["single"]), *(single[n] for n in sorted(leaders))]
