"""A paper's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loraweave.reporting.tables import OWN

AVERAGE, LARGEST = "average", "largest_weight"
PAPER, HERE = "paper", "here"
_ALIGNMENT = "image_alignment_"


def published_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``column``, ``task``, ``method``, ``paper`` and ``here``; a number is None where one side has none.

    Columns are the paper's; ``task`` is what stands in for one here, mostly of the same name. ``largest_weight`` stands
    beside the largest share of weight that an expert has. Last comes ``average``, if there are scores: the paper's own
    where it prints one, and the mean over all tasks here. Tasks that the paper does not have stand in the comparison's
    own table alone. ``image_alignment_2`` is that of the second element of a test bed, whatever it is called.

    Args:
        results: the content of ``results.json``; without ``recipe.published`` there are no rows.
    """
    published = (results.get("recipe") or {}).get("published")
    if not published:
        return []
    printed, stand_ins = published["scores"], published.get("tasks") or {}
    ours = {method: {task: _value(of) for task, of in tasks.items()} for method, tasks in results["scores"].items()}
    ours[OWN] = results.get("own", {})
    elements = list(((results.get("recipe") or {}).get("testbed") or {}).get("elements") or ())
    named = {f"{_ALIGNMENT}{n}": f"{_ALIGNMENT}{name}" for n, name in enumerate(elements, start=1)}
    shares = {method: {LARGEST: _value(of)} for method, of in (results.get("largest_weight") or {}).items()}
    # Alignments with texts and with pictures have no common mean.
    averaged = "retention" in results
    columns = [c for c in dict.fromkeys(c for scores in printed.values() for c in scores) if c != AVERAGE]
    rows = []
    for column in [*columns, *([AVERAGE] if set(columns) != {LARGEST} else [])]:
        task = stand_ins.get(column, column)
        for method, scores in printed.items():
            of_method = (shares if column == LARGEST else ours).get(method, {})
            here = of_method.get(task, of_method.get(named.get(column, "")))
            if averaged and column == AVERAGE and ours.get(method):
                here = statistics.fmean(ours[method].values())
            rows.append({"column": column, "task": task, "method": method, PAPER: scores.get(column), HERE: here})
    return rows


def published_table(results: Mapping[str, Any], *, width: int | None = None) -> Table | None:
    """The same as a table to print, or None where the recipe has no published figures.

    Args:
        results: as for :func:`published_rows`.
        width: characters there are; where two columns for each method are too wide, each figure has a line of its own.
            Default: the terminal's.
    """
    rows = published_rows(results)
    if not rows:
        return None
    published = results["recipe"]["published"]
    small = " on the bundled zoo" if results["recipe"].get("base") in ("zoo", "zoo:images") else ""
    note = f" ({published['note']})" if published.get("note") else ""
    title = f"{published['source']}: figures of the paper, and ours{small}{note}"
    columns: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        columns.setdefault(row["column"], []).append(row)
    digits = {column: digits_of(of) for column, of in columns.items()}
    console = Console()
    wide = _wide(columns, digits, title)
    needed = Measurement.get(console, console.options.update(max_width=10_000), wide).maximum
    return wide if needed <= (width or console.width) else _long(columns, digits, title)


def _wide(columns: Mapping[str, Sequence[Mapping[str, Any]]], digits: Mapping[str, int], title: str) -> Table:
    table = _empty(title)
    for row in next(iter(columns.values())):
        for side in (PAPER, HERE):
            table.add_column(Text(f"{row['method']}\n{side}"), justify="right", overflow="fold")
    for column, rows in columns.items():
        cells = [_text(row[side], digits[column]) for row in rows for side in (PAPER, HERE)]
        if any(cell != "-" for cell in cells):
            table.add_row(Text(stand_in(rows[0])), *cells)
    return table


def _long(columns: Mapping[str, Sequence[Mapping[str, Any]]], digits: Mapping[str, int], title: str) -> Table:
    table = _empty(title)
    table.add_column("method")
    for side in (PAPER, HERE):
        table.add_column(side, justify="right", no_wrap=True)
    for column, rows in columns.items():
        shown = [row for row in rows if row[PAPER] is not None or row[HERE] is not None]
        for n, row in enumerate(shown):
            cells = (_text(row[side], digits[column]) for side in (PAPER, HERE))
            name = "" if n else stand_in(row)
            table.add_row(Text(name), Text(row["method"]), *cells, end_section=n == len(shown) - 1)
    return table


def _empty(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    return table


def stand_in(row: Mapping[str, Any]) -> str:
    """``qnli (here days_before)``: where another task stands in, nobody should take it for the paper's."""
    return row["column"] if row["task"] == row["column"] else f"{row['column']} (here {row['task']})"


def digits_of(rows: Sequence[Mapping[str, Any]]) -> int:
    """Cosines, or percentages."""
    figures = [abs(row[side]) for row in rows for side in (PAPER, HERE) if row[side] is not None]
    return 3 if max(figures, default=0.0) < 2 else 1


def _value(score: Any) -> float:
    """A spread over seeds, or a number."""
    return float(score["mean"] if isinstance(score, Mapping) else score)


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
