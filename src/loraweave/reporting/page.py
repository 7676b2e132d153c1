"""One HTML page about a comparison, or about several: nothing outside it is needed to read it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from loraweave.errors import LoraweaveError
from loraweave.evaluation.comparison import SINGLE
from loraweave.files import write_text_atomic
from loraweave.reporting.charts import Line, line_chart
from loraweave.reporting.plots import short_names
from loraweave.reporting.tables import SUMMARY, enough, note, summary_rows

PAGE = "report.html"
_COLOURS = 8
# Numbers stand in the cells of a heat map where it has no more columns than this.
_NUMBERED = 14
# More single experts than this are not all shown.
_SINGLES = 12
_LARGEST_PICTURE = 32_000_000


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about ``run``.

    Args:
        run: a folder that ``loraweave compare``, ``demo`` or ``image`` wrote; or a folder of such folders, which adds
            curves over the number of experts where the comparisons differ in it.
        out: default: ``report.html`` in ``run``.

    Returns:
        Where it was written.

    Raises:
        LoraweaveError: there is nothing to report, or a file is not what these commands write.
    """
    place = Path(run)
    target = place / PAGE if out is None else Path(out)
    write_text_atomic(target, render(place))
    return target


def render(run: Path) -> str:
    """The page itself. Raises as :func:`write_report`."""
    import jinja2

    if not run.is_dir():
        raise LoraweaveError(f"{str(run)!r}: no such folder; expected what 'loraweave compare' or 'image' wrote")
    folders = [run, *sorted(path for path in run.iterdir() if path.is_dir())]
    runs = [found for folder in folders if (found := _run(folder, run)) is not None]
    if not runs:
        raise LoraweaveError(
            f"{str(run)!r}: nothing to report; expected results.json or image.json in it or just below"
        )
    template = (resources.files("loraweave.reporting") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["breakable"] = _breakable
    title = run.resolve().name
    return environment.from_string(template).render(title=title, runs=runs, scaling=scaling_curves(runs))


def scaling_curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Retention over the number of experts, where runs differ in it: chart and legend; else None."""
    sized = sorted((run["experts"], run["results"]) for run in runs if run.get("results")) if _sizes(runs) else []
    if not sized:
        return None
    methods = list(dict.fromkeys(m for _, found in sized for m in found["retention"] if not m.startswith(SINGLE)))
    lines = []
    for number, method in enumerate(methods):
        there = [(n, found["retention"][method]) for n, found in sized if method in found["retention"]]
        points, spread = [(float(n), kept["mean"]) for n, kept in there], [kept["std"] for _, kept in there]
        lines.append(Line(method, points, _colour(number), thick=True, spread=spread))
    chart = line_chart(lines, "experts", "retention", logarithmic=True)
    return {"chart": chart, "legend": [(line.name, line.colour) for line in lines]}


def _sizes(runs: Sequence[Mapping[str, Any]]) -> bool:
    counts = [run["experts"] for run in runs if run.get("results")]
    # Two comparisons of one size are no curve; neither are points above each other.
    return len(set(counts)) == len(counts) > 1


# ---------------------------------------------------------------- one run


def _run(folder: Path, whole: Path) -> dict[str, Any] | None:
    """What the template shows of one folder; None if it holds nothing of ours."""
    results, pictures = _json(folder / "results.json"), _json(folder / "image.json")
    if results is None and pictures is None:
        return None
    shown: dict[str, Any] = {"name": "" if folder == whole else folder.name, "results": None, "pictures": None}
    try:
        if results is not None:
            shown |= _comparison(folder, results)
        if pictures is not None:
            shown["pictures"] = _pictures(folder, pictures)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise LoraweaveError(
            f"{folder}: not what 'compare' or 'image' of this version writes ({type(error).__name__}: {error})"
        ) from error
    return shown


def _comparison(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    recipe = results["recipe"]
    weights, scores = _json(folder / "weights.json"), _scores(results)
    shown = _few(scores)
    cells = [cell for name in results["cells"] if (cell := _json(folder / "cells" / Path(name).name)) is not None]
    return {
        "results": results,
        "experts": len(recipe["experts"]) + len(recipe.get("merged") or {}),
        "facts": _facts(results),
        "summary": _summary(results),
        "note": note(results),
        "tasks": list(results["metrics"]),
        "scores": shown,
        "hidden": len(scores) - len(shown),
        "heat": None if weights is None else _heat(weights),
        "training": [curves for method in results["scores"] if (curves := _curves(method, cells)) is not None],
        "recipe": json.dumps(recipe, indent=2, ensure_ascii=False),
    }


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the summary, and where the marks of the intervals stand, in percent of the widest difference."""
    found = results["differences"]
    reach = max((max(abs(d["low"]), abs(d["high"])) for d in found.values()), default=0.0) or 1.0

    def place(value: float) -> float:
        return round(50 + 50 * value / reach, 2)

    marks = {
        method: {"rival": d["rival"], **{name: place(d[name]) for name in ("low", "difference", "high")}}
        for method, d in found.items()
    }
    sure = {method: bool(d.get("clear")) for method, d in found.items()}
    return {"head": SUMMARY, "rows": summary_rows(results), "marks": marks, "sure": sure}


def _scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _heat(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Panels: experts by sites, each weight with its share of the strongest colour in percent."""
    panels, experts = weights["panels"], list(weights["experts"])
    values = [abs(float(w)) for sites in panels.values() for ws in sites.values() for w in ws]
    if not all(map(math.isfinite, values)):
        raise ValueError("a weight is not finite")
    top = max(values, default=0.0) or 1.0
    shown = []
    for panel, sites in panels.items():
        grid = [[float(ws[n]) for ws in sites.values()] for n in range(len(experts))]
        cells = [
            [{"weight": f"{w:.2f}", "share": round(100 * abs(w) / top), "minus": w < 0} for w in row] for row in grid
        ]
        shown.append({"name": panel, "rows": list(zip(experts, cells, strict=True))})
    sites = list(next(iter(panels.values()), {}))
    return {
        "method": weights["method"],
        "panels": shown,
        "sites": list(zip(sites, short_names(sites) if sites else [], strict=True)),
        "numbers": len(sites) <= _NUMBERED,
        "top": f"{top:.2f}",
    }


def _curves(method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss and entropy of one method's training: every seed, and of the first each site."""
    logs = [[r for r in cell["history"] if "entropy" in r] for cell in cells if cell["method"] == method]
    logs = [log for log in logs if log]
    if not logs:
        return None
    names = [name for name in logs[0][0] if name.startswith("entropy/")]
    sites = [
        Line(name.removeprefix("entropy/"), _points(logs[0], name), _ramp(n, len(names)))
        for n, name in enumerate(names)
    ]
    experts = sum(name.startswith("load/") for name in logs[0][0])
    means = [
        Line(f"mean over sites, run {n}", _points(log, "entropy"), "var(--ink)", thick=True)
        for n, log in enumerate(logs)
    ]
    steps = [step for step, _ in means[0].points]
    even = (
        [
            Line(
                "all experts alike",
                [(steps[0], math.log(experts)), (steps[-1], math.log(experts))],
                "var(--muted)",
                dashed=True,
            )
        ]
        if experts > 1
        else []
    )
    losses = [Line(f"run {n}", _points(log, "task_loss"), "var(--ink)", thick=True) for n, log in enumerate(logs)]
    shorter = short_names([line.name for line in sites]) if sites else []
    return {
        "method": method,
        "entropy": line_chart([*even, *sites, *means], "step", "entropy of the gates, nats"),
        "loss": line_chart(losses, "step", "loss on the task"),
        "sites": [(name, line.colour) for name, line in zip(shorter, sites, strict=True)],
        "seeds": len(logs),
    }


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), float(record[name])) for record in log if name in record]


def _pictures(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    sheet = folder / "sheet.png"
    content = sheet.read_bytes() if sheet.is_file() and sheet.stat().st_size <= _LARGEST_PICTURE else b""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise LoraweaveError(f"{sheet}: expected the contact sheet, a PNG picture of at most {_LARGEST_PICTURE} bytes")
    facts = [
        ("prompt", described["prompt"]),
        ("base", f"{described['base']} ({described['pipeline']}, {described['scheduler']})"),
        ("experts", ", ".join(expert["name"] for expert in described["experts"])),
        ("methods", ", ".join(described["methods"])),
    ]
    source = Markup("data:image/png;base64,") + base64.b64encode(content).decode()
    seconds = {entry["method"]: entry["seconds"] for entry in described["pictures"]}
    return {"source": source, "facts": [(name, str(value)) for name, value in facts], "seconds": seconds}


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraweaveError(f"{path}: cannot be read ({error})") from error


def _breakable(name: str) -> Markup:
    """A name that may be broken at its joints, where a column is narrow."""
    return escape(name).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))


def _colour(number: int) -> str:
    return f"var(--c{number % _COLOURS})"


def _ramp(number: int, count: int) -> str:
    """From blue over green to orange, first to last, readable on light and dark."""
    return f"hsl({round(225 - 200 * number / max(1, count - 1))} 62% 52%)"
