"""A paper's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from loraweave.reporting.tables import OWN

AVERAGE = "average"
PAPER, HERE = "paper", "here"
_ALIGNMENT = "image_alignment_"


def published_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``column``, ``method``, ``paper`` and ``here``; a number is None where one side has none.

    Columns are the paper's, then ``average``: the paper's own where it prints one, and the mean over all tasks here.
    Tasks that the paper does not have stand in the comparison's own table alone. ``image_alignment_2`` is that of the
    second element of a test bed, whatever it is called.

    Args:
        results: the content of ``results.json``; without ``recipe.published`` there are no rows.
    """
    published = (results.get("recipe") or {}).get("published")
    if not published:
        return []
    printed = published["scores"]
    ours = {method: {task: _value(of) for task, of in tasks.items()} for method, tasks in results["scores"].items()}
    ours[OWN] = results.get("own", {})
    elements = list(((results.get("recipe") or {}).get("testbed") or {}).get("elements") or ())
    named = {f"{_ALIGNMENT}{n}": f"{_ALIGNMENT}{name}" for n, name in enumerate(elements, start=1)}
    # Alignments with texts and with pictures have no common mean.
    averaged = "retention" in results
    columns = [c for c in dict.fromkeys(c for scores in printed.values() for c in scores) if c != AVERAGE]
    rows = []
    for column in [*columns, AVERAGE]:
        for method, scores in printed.items():
            of_method = ours.get(method, {})
            here = of_method.get(column, of_method.get(named.get(column, "")))
            if averaged and column == AVERAGE and ours.get(method):
                here = statistics.fmean(ours[method].values())
            rows.append({"column": column, "method": method, PAPER: scores.get(column), HERE: here})
    return rows


def published_table(results: Mapping[str, Any]) -> Table | None:
    """The same as a table to print, or None where the recipe has no published figures."""
    rows = published_rows(results)
    if not rows:
        return None
    published = results["recipe"]["published"]
    small = " on the bundled zoo" if results["recipe"].get("base") in ("zoo", "zoo:images") else ""
    note = f" ({published['note']})" if published.get("note") else ""
    title = f"{published['source']}: figures of the paper, and ours{small}{note}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        for side in (PAPER, HERE):
            table.add_column(Text(f"{method}\n{side}"), justify="right", overflow="fold")
    # Cosines, or percentages.
    figures = [row[side] for row in rows for side in (PAPER, HERE) if row[side] is not None]
    digits = 3 if max(map(abs, figures), default=0.0) < 2 else 1
    for column in dict.fromkeys(row["column"] for row in rows):
        cells = [_text(row[side], digits) for row in rows if row["column"] == column for side in (PAPER, HERE)]
        if any(cell != "-" for cell in cells):
            table.add_row(Text(column), *cells)
    return table


def _value(score: Any) -> float:
    """A spread over seeds, or a number."""
    return float(score["mean"] if isinstance(score, Mapping) else score)


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
