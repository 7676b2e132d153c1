"""Comparison tables from the content of ``results.json``, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import DECISIVE
from loraweave.evaluation.comparison import SINGLE

Layout = Literal["auto", "methods", "tasks"]
BEST = "*"
OWN = "each expert alone"


def results_table(
    results: Mapping[str, Any], *, title: str | None = None, layout: Layout = "auto", width: int | None = None
) -> Table:
    """A table to print: methods as rows, tasks and retention as columns.

    The best value of a column is marked ``*`` (and bold), ties all of them; not where fewer than six items were asked,
    of which chance may decide. Single experts (``only:NAME``) stand apart
    below and do not compete: each wins its own task by nature. The last row is the yardstick of retention, each
    expert's score on its own task.

    Args:
        results: from :func:`loraweave.evaluation.comparison.summarise`, or ``results.json`` read back.
        title: stands above the table.
        layout: ``"methods"`` is as above; ``"tasks"`` is for narrow terminals: tasks as rows, and of the single experts
            just the one with the highest retention; ``"auto"`` takes it where the other is too wide.
        width: characters there are, for ``"auto"``; default: the terminal's.

    Raises:
        LoraweaveError: ``results`` lacks ``scores`` or ``retention``.
    """
    rows, columns = _rows(results), _columns(results)
    if layout == "tasks":
        return _by_tasks(rows, columns, title)
    table = _by_methods(rows, columns, title)
    if layout == "methods":
        return table
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    return table if needed <= (width or console.width) else _by_tasks(rows, columns, title)


def summary_table(results: Mapping[str, Any], *, title: str | None = None) -> Table:
    """A table to print: methods as rows; mean score and retention, the difference to the best rival, and costs.

    Best first. ``score`` is the mean over tasks. The difference is in retention, with its 95 % interval; ``*`` where
    that leaves out 0 and rests on enough items. Times are means over seeds: of training, and of answering one item;
    ``evals`` are optimizer steps, or weightings that a search tried; memory is the process's with the model, on the GPU
    where one was used.

    Args:
        results: ``results.json``, with ``differences`` and ``costs``.
        title: stands above the table.

    Raises:
        LoraweaveError: ``results`` is from an earlier version and lacks them.
    """
    table = _empty("method", SUMMARY, title)
    table.caption, table.caption_justify = note(results), "left"
    # Narrow gaps, so that intervals have room in 80 columns.
    table.padding = (0, 0, 0, 0)
    table.columns[3].min_width = 15
    for row in summary_rows(results):
        # Only the interval may be broken, behind the difference.
        table.add_row(*(Text(cell, no_wrap=n != 3) for n, cell in enumerate(row)))
    return table


SUMMARY = ("score", "retention", "to best rival", "train s", "evals", "ms/item", "GB")


def summary_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of :func:`summary_table`: each method's name, then as :data:`SUMMARY`; best retention first."""
    for key in ("scores", "retention", "differences", "costs"):
        if key not in results:
            raise LoraweaveError(f"results: expected {key!r}; was this comparison made by an earlier version?")
    competing = [method for method in results["scores"] if not method.startswith(SINGLE)]
    ranked = sorted(competing, key=lambda method: -results["retention"][method]["mean"])
    return [[method, *_summary(results, method)] for method in ranked]


def _summary(results: Mapping[str, Any], method: str) -> list[str]:
    scores, kept, cost = results["scores"][method], results["retention"][method], results["costs"][method]
    memory = cost["peak_memory_gb"] if cost["peak_gpu_memory_gb"] is None else cost["peak_gpu_memory_gb"]
    return [
        f"{sum(spread['mean'] for spread in scores.values()) / len(scores):.1f}",
        f"{kept['mean']:.3f}" + (f" ± {kept['std']:.3f}" if len(kept["per_seed"]) > 1 else ""),
        _difference(results["differences"].get(method)),
        f"{cost['train_seconds']:.1f}" if cost["train_seconds"] else "-",
        f"{cost['evaluations']:.0f}" if cost["evaluations"] else "-",
        f"{1000 * cost['seconds_per_item']:.0f}",
        "-" if memory is None else f"{memory:.2f}",
    ]


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    # Intervals of earlier versions do not say whether they decide.
    clear = BEST if found.get("clear") else ""
    return f"{found['difference']:+.2f} [{found['low']:+.2f},{found['high']:+.2f}]{clear}"


def to_markdown(results: Mapping[str, Any], *, deviations: bool = True) -> str:
    """The same as a Markdown table, methods as rows, the best of each column in bold.

    Args:
        results: as in :func:`results_table`.
        deviations: show ``± std`` beside scores too, not just beside retention.

    Raises:
        LoraweaveError: as :func:`results_table`.
    """
    rows, columns = _rows(results), _columns(results)
    lines = [["method", *map(_escaped, columns)], ["---", *["---:"] * len(columns)]]
    for row in rows:
        last = len(row.cells) - 1
        texts = (cell.value + (cell.deviation if deviations or n == last else "") for n, cell in enumerate(row.cells))
        marked = (f"**{text}**" if cell.best else text for text, cell in zip(texts, row.cells, strict=True))
        lines.append([_escaped(row.name), *marked])
    said = note(results)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + ("" if said is None else f"\n{_escaped(said)}\n")


def enough(results: Mapping[str, Any], task: str | None = None) -> bool:
    """Whether so many items were asked, of a task or of all, that it means something to be the best."""
    items = results.get("items") or {}
    asked = sum(items.values()) if task is None else items.get(task, DECISIVE)
    return not items or asked >= DECISIVE


def note(results: Mapping[str, Any]) -> str | None:
    """What a reader of the tables must know of some methods."""
    alone = results.get("per_task")
    return f"Learned anew for each task, from its examples alone: {', '.join(alone)}." if alone else None


@dataclass(frozen=True)
class _Cell:
    """``deviation`` is ``" ± std"``, or empty for a single run."""

    value: str
    deviation: str = ""
    best: bool = False


@dataclass(frozen=True)
class _Row:
    """A method: its tasks' cells, then retention. ``kind`` 0 competes, 1 is a single expert, 2 the yardstick."""

    name: str
    kind: int
    cells: Sequence[_Cell]
    retention: float


def _columns(results: Mapping[str, Any]) -> list[str]:
    return [*next(iter(results["scores"].values())), "retention"]


def _rows(results: Mapping[str, Any]) -> list[_Row]:
    for key in ("scores", "retention"):
        if not results.get(key):
            raise LoraweaveError(f"results: expected {key!r} of at least one method; is this a results.json?")
    scores, retention = results["scores"], results["retention"]
    tasks = list(next(iter(scores.values())))
    competing = [method for method in scores if not method.startswith(SINGLE)]
    rows = []
    for method in sorted(scores, key=lambda method: method not in competing):
        rivals = competing if method in competing and len(competing) > 1 else []
        cells = [_cell(scores[method][t], [scores[m][t] for m in rivals if enough(results, t)], 1) for t in tasks]
        cells.append(_cell(retention[method], [retention[m] for m in rivals if enough(results)], 3))
        rows.append(_Row(method, int(method not in competing), cells, retention[method]["mean"]))
    own = results.get("own")
    if own:
        yardstick = [_Cell(f"{own[task]:.1f}" if task in own else "-") for task in tasks]
        rows.append(_Row(OWN, 2, [*yardstick, _Cell("1.000")], 1.0))
    return rows


def _cell(spread: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], digits: int) -> _Cell:
    value = f"{spread['mean']:.{digits}f}"
    deviation = f" ± {spread['std']:.{digits}f}" if len(spread.get("per_seed", ())) > 1 else ""
    # Compared as shown: two equal numbers of which one is marked would puzzle.
    best = bool(rivals) and float(value) == max(float(f"{rival['mean']:.{digits}f}") for rival in rivals)
    return _Cell(value, deviation, best)


def _by_methods(rows: Sequence[_Row], columns: Sequence[str], title: str | None) -> Table:
    table = _empty("method", columns, title)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        *scores, retention = row.cells
        end = after is not None and after.kind != row.kind
        shown = [*(replace(cell, deviation="") for cell in scores), retention]
        table.add_row(Text(row.name), *map(_text, shown), end_section=end)
    return table


def _by_tasks(rows: Sequence[_Row], columns: Sequence[str], title: str | None) -> Table:
    best_single = max((row for row in rows if row.kind == 1), key=lambda row: row.retention, default=None)
    shown = [row for row in rows if row.kind != 1 or row is best_single]
    table = _empty("task", [_breakable(row.name) for row in shown], title)
    for n, column in enumerate(columns):
        before_last = n == len(columns) - 2
        cells = (_text(replace(row.cells[n], deviation="")) for row in shown)
        table.add_row(Text(column), *cells, end_section=before_last)
    if any(row.cells[-1].deviation for row in shown):
        deviations = (_text(_Cell(row.cells[-1].deviation.removeprefix(" ± "))) for row in shown)
        table.add_row(Text("  ± over seeds"), *deviations)
    return table


def _empty(corner: str, columns: Sequence[str], title: str | None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(corner, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table


def _text(cell: _Cell) -> Text:
    # The blank keeps digits of marked and unmarked cells in line.
    whole = cell.value + cell.deviation
    return Text(f"{whole}{BEST}", style="bold", no_wrap=True) if cell.best else Text(f"{whole} ", no_wrap=True)


def _breakable(name: str) -> str:
    """A long name with blanks at its joints, where a narrow column may break it."""
    return name if len(name) <= 8 else name.replace("_", "_ ").replace(":", ": ")


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")
