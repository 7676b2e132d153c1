"""Curves: training of one method, and retention over the number of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.evaluation.comparison import SINGLE
from loraweave.reporting.charts import GUIDE, Line, line_chart, look
from loraweave.reporting.plots import short_names

# More sites than this are not all named.
_NAMED = 24


def training(method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss and entropy of one method's training: every seed, and of the first each site. None if it has no gates."""
    logs = [[r for r in cell["history"] if "entropy" in r] for cell in cells if cell["method"] == method]
    logs = [log for log in logs if log]
    if not logs:
        return None
    names = [name for name in logs[0][0] if name.startswith("entropy/")]
    sites = [
        Line(name.removeprefix("entropy/"), _points(logs[0], name), _ramp(n, len(names)))
        for n, name in enumerate(names)
    ]
    means = [
        Line(f"mean over sites, run {n}", _points(log, "entropy"), "var(--ink)", thick=True)
        for n, log in enumerate(logs)
    ]
    steps = [step for step, _ in means[0].points]
    experts = sum(name.startswith("load/") for name in logs[0][0])
    # Of N equal weights the entropy is ln N.
    even = [(step, math.log(experts)) for step in (steps[0], steps[-1])] if experts > 1 else []
    guide = [Line("all experts alike", even, "var(--muted)", dash=GUIDE)] if even else []
    losses = [Line(f"run {n}", _points(log, "task_loss"), "var(--ink)", thick=True) for n, log in enumerate(logs)]
    shorter = short_names([line.name for line in sites]) if sites else []
    legend = [(name, line.key) for name, line in zip(shorter, sites, strict=True)]
    return {
        "method": method,
        "entropy": line_chart([*guide, *sites, *means], "step", "entropy of the gates, nats"),
        "loss": line_chart(losses, "step", "loss on the task"),
        "legend": legend if len(legend) <= _NAMED else [legend[0], legend[-1]],
        "left_out": 0 if len(legend) <= _NAMED else len(legend) - 2,
        "seeds": len(logs),
    }


def scaling(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Retention over the number of experts, where comparisons differ in it; else None.

    Args:
        comparisons: with ``experts`` (their number) and ``retention`` (method -> spread).
    """
    counts = [one["experts"] for one in comparisons]
    # Two comparisons of one size are no curve; neither are points above each other.
    if not len(set(counts)) == len(counts) > 1:
        return None
    sized = sorted(comparisons, key=lambda one: int(one["experts"]))
    methods = list(dict.fromkeys(m for one in sized for m in one["retention"] if not m.startswith(SINGLE)))
    lines, rows = [], []
    for number, method in enumerate(methods):
        there = [(one["experts"], one["retention"][method]) for one in sized if method in one["retention"]]
        points, spread = [(float(n), kept["mean"]) for n, kept in there], [kept["std"] for _, kept in there]
        lines.append(Line(method, points, thick=True, spread=spread, **look(number)))
        cells = [one["retention"].get(method) for one in sized]
        rows.append({"name": method, "key": lines[-1].key, "cells": cells})
    return {
        "chart": line_chart(lines, "experts", "retention", logarithmic=True),
        "sizes": [one["experts"] for one in sized],
        "rows": rows,
    }


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), float(record[name])) for record in log if name in record]


def _ramp(number: int, count: int) -> str:
    """From blue over green to orange, first to last, readable on light and dark."""
    return f"hsl({round(225 - 200 * number / max(1, count - 1))} 62% 52%)"
