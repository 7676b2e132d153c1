"""Comparison tables from the content of ``results.json``, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loraweave.evaluation.comparison import SINGLE

Layout = Literal["auto", "methods", "tasks"]
BEST = "*"
OWN = "each expert alone"


def results_table(
    results: Mapping[str, Any], *, title: str | None = None, layout: Layout = "auto", width: int | None = None
) -> Table:
    """A table to print: methods as rows, tasks and retention as columns.

    The best value of a column is marked ``*`` (and bold), ties all of them. Single experts (``only:NAME``) stand apart
    below and do not compete: each wins its own task by nature. The last row is the yardstick of retention, each
    expert's score on its own task.

    Args:
        results: from :func:`loraweave.evaluation.comparison.summarise`, or ``results.json`` read back.
        title: stands above the table.
        layout: ``"tasks"`` turns the table round, tasks as rows; ``"auto"`` does so where the other is too wide.
        width: characters there are, for ``"auto"``; default: the terminal's.
    """
    table = _render(_grid(results), title, turned=layout == "tasks")
    if layout != "auto":
        return table
    console = Console()
    there = width or console.width
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    return table if needed <= there else _render(_grid(results), title, turned=True)


def to_markdown(results: Mapping[str, Any], *, spread: bool = True) -> str:
    """The same as a Markdown table, tasks as columns, the best of each column in bold.

    Args:
        results: as in :func:`results_table`.
        spread: show ``± std`` beside scores, not just beside retention.
    """
    grid = _grid(results, spread=spread)
    lines = [["method", *map(_escaped, grid.columns)], ["---", *["---:"] * len(grid.columns)]]
    for row in grid.rows:
        cells = (f"**{cell}**" if best else cell for cell, best in zip(row.cells, row.best, strict=True))
        lines.append([_escaped(row.name), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class _Row:
    name: str
    group: int
    cells: Sequence[str]
    best: Sequence[bool]


@dataclass(frozen=True)
class _Grid:
    """What a table says, before it has a form: the text of every cell, and whether it is the best of its column."""

    columns: Sequence[str]
    rows: Sequence[_Row]


def _grid(results: Mapping[str, Any], *, spread: bool = False) -> _Grid:
    scores, retention = results["scores"], results["retention"]
    tasks = list(next(iter(scores.values())))
    competing = [method for method in scores if not method.startswith(SINGLE)]
    rows = []
    for group, methods in enumerate((competing, [method for method in scores if method not in competing])):
        for method in methods:
            cells = [_number(scores[method][task], 1, spread) for task in tasks]
            best = [
                not group and _is_best(scores[method][task], [scores[m][task] for m in competing], 1) for task in tasks
            ]
            cells.append(_number(retention[method], 3, True))
            best.append(not group and _is_best(retention[method], [retention[m] for m in competing], 3))
            rows.append(_Row(method, group, cells, best))
    own = results.get("own", {})
    if own:
        yardstick = [f"{own[task]:.1f}" if task in own else "-" for task in tasks]
        rows.append(_Row(OWN, 2, [*yardstick, f"{1:.3f}"], [False] * (len(tasks) + 1)))
    return _Grid([*tasks, "retention"], rows)


def _number(spread: Mapping[str, Any], digits: int, with_deviation: bool) -> str:
    several = len(spread.get("per_seed", ())) > 1
    deviation = f" ± {spread['std']:.{digits}f}" if with_deviation and several else ""
    return f"{spread['mean']:.{digits}f}{deviation}"


def _is_best(spread: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], digits: int) -> bool:
    # Compared as shown: two equal numbers of which one is marked would puzzle.
    return len(rivals) > 1 and round(spread["mean"], digits) == max(round(rival["mean"], digits) for rival in rivals)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _render(grid: _Grid, title: str | None, *, turned: bool) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("task" if turned else "method", overflow="fold")
    if turned:
        for row in grid.rows:
            table.add_column(Text(row.name), justify="right", overflow="fold")
        for n, column in enumerate(grid.columns):
            last = n == len(grid.columns) - 1
            table.add_row(
                Text(column), *(_cell(row, n) for row in grid.rows), end_section=last or n == len(grid.columns) - 2
            )
        return table
    for column in grid.columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    for row, after in zip(grid.rows, [*grid.rows[1:], None], strict=True):
        end = after is None or after.group != row.group
        table.add_row(Text(row.name), *(_cell(row, n) for n in range(len(grid.columns))), end_section=end)
    return table


def _cell(row: _Row, n: int) -> Text:
    # The blank keeps digits of marked and unmarked cells in line.
    return Text(row.cells[n] + BEST, style="bold") if row.best[n] else Text(row.cells[n] + " ")
