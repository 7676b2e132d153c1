"""Pictures: the learned weights per site and expert, and how training went.

matplotlib is loaded when a picture is drawn, and only its object interface is used: nothing global is touched, and no
display is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraweave.errors import LoraweaveError
from loraweave.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = Mapping[str, Sequence[float]]

# Inches; a panel never gets wider or higher than the largest one, cells shrink instead.
_CELL = (0.5, 0.34)
_PANEL = (15.0, 9.0)
_ALL_PANELS = 20.0
_LETTER = 0.078


def heat_map(
    weights: Weights, experts: Sequence[str], path: str | os.PathLike[str], title: str = "", **options: Any
) -> None:
    """Draw what each site gives to each expert, as Fig. 7 of the MoLE paper does, and write it to ``path``.

    Args:
        weights: site -> one weight per expert, sites from first to last.
        experts: names in the order of the weights.
        path: ``.png``, ``.pdf`` or ``.svg``; written atomically.
        title: stands above.
        **options: as in :func:`heat_maps`.

    Raises:
        LoraweaveError: nothing to draw, a site with another number of weights, or a weight that is not finite.
    """
    heat_maps({"": weights}, experts, path, title, **options)


def heat_maps(
    panels: Mapping[str, Weights],
    experts: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "",
    *,
    columns: int | None = None,
    lowest: float | None = None,
    highest: float | None = None,
) -> None:
    """Several heat maps in one picture with one colour scale, e.g. one for the test data of each task.

    Where a panel is called like an expert, that expert's row is framed: there its weight ought to be high. Numbers
    stand in the cells where they fit. Colours go from 0 to the largest weight (viridis); with negative weights they are
    symmetric about 0 (red and blue).

    Args:
        panels: name -> site -> one weight per expert; all with the same sites.
        experts: names in the order of the weights.
        path: ``.png``, ``.pdf`` or ``.svg``; written atomically.
        title: stands above.
        columns: panels in a row; default: whatever makes the picture about as wide as high.
        lowest: weight at the bottom of the colour scale.
        highest: weight at its top, e.g. the policy's scale, to compare pictures.

    Raises:
        LoraweaveError: nothing to draw, a site with another number of weights, a weight that is not finite, panels with
            different sites, or a file type that cannot be written.
    """
    grids = {name: _grid(weights, experts, name) for name, weights in panels.items()}
    sites = _common_sites(panels)
    low, high = _limits(grids, lowest, highest)
    labels = short_names(sites)
    cell = (min(_CELL[0], _PANEL[0] / len(sites)), min(_CELL[1], _PANEL[1] / len(experts)))
    columns = columns or _columns(len(grids), cell[0] * len(sites), cell[1] * len(experts))
    cell = (min(cell[0], _ALL_PANELS / (columns * len(sites))), cell[1])
    rows = math.ceil(len(grids) / columns)

    # Inches around the panels, ample: what stays empty is cut off when the picture is written.
    left = 0.3 + _LETTER * max(map(len, experts))
    below = 0.45 + _LETTER * max(map(len, labels)) * (1.0 if _slanted(labels, cell[0]) else 0.0)
    panel_title = 0.3 if any(grids) else 0.08
    top = panel_title + (0.4 if title else 0.0)
    gap = 0.22
    panel_width, panel_height = cell[0] * len(sites), cell[1] * len(experts)
    width = left + columns * panel_width + (columns - 1) * gap + 0.95
    height = top + rows * panel_height + (rows - 1) * (panel_title + gap) + below

    figure = _figure(width, height)
    for n, (name, grid) in enumerate(grids.items()):
        row, column = divmod(n, columns)
        x = left + column * (panel_width + gap)
        y = height - top - (row + 1) * panel_height - row * (panel_title + gap)
        axes = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
        image = axes.imshow(
            grid, aspect="auto", vmin=low, vmax=high, cmap="RdBu_r" if low < 0 else "viridis", interpolation="nearest"
        )
        axes.set_title(name, fontsize=10, pad=4)
        lowest_panel = n + columns >= len(grids)
        _ticks(axes, labels if lowest_panel else None, experts if column == 0 else None, cell)
        if name in experts:
            _frame_row(axes, list(experts).index(name), len(sites), bold=column == 0)
        _numbers(axes, image, grid, cell)
    if title:
        figure.text(left / width, 1 - 0.12 / height, title, fontsize=12, va="top", ha="left")
    bar_height = min(rows * panel_height, 3.0)
    bar = figure.add_axes(
        ((width - 0.75) / width, (height - top - bar_height) / height, 0.15 / width, bar_height / height)
    )
    figure.colorbar(image, cax=bar)
    bar.set_ylabel("weight", fontsize=9)
    bar.tick_params(labelsize=8)
    _save(figure, path)


def training_curve(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw losses, entropy and load over the steps, one panel below the other, and write it to ``path``.

    Args:
        log_history: ``trainer.state.log_history``: dicts with ``step`` and named numbers. A name is drawn where what
            stands before its slash holds ``balance``, ``entropy``, ``load`` or ``loss``, each in a panel.
            Names with a slash (``entropy/SITE``, ``load/EXPERT``) are thin coloured lines, from first to last.
        path: ``.png``, ``.pdf`` or ``.svg``; written atomically.
        title: stands above.

    Raises:
        LoraweaveError: the history holds none of these.
    """
    panels = {name: lines for name, lines in _curves(log_history).items() if lines}
    if not panels:
        raise LoraweaveError("no curve to draw: the log has no step with a loss; train with logging_steps set")
    height = 0.5 + 2.1 * len(panels) + (0.35 if title else 0.0)
    figure = _figure(7.0, height)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(grid, panels.items(), strict=True):
        _lines(axes, lines)
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("step")
    if title:
        figure.suptitle(title, fontsize=12)
    _save(figure, path)


def short_names(names: Sequence[str]) -> list[str]:
    """Module paths without what all of them share: ``model.layers.0, model.layers.1`` become ``0, 1``.

    Parts that differ stay, and with them what tells names apart: ``encoder.block.0, decoder.block.0`` become
    ``encoder.0, decoder.0``. A single name keeps its last part.
    """
    split = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return [parts[-1] for parts in split]
    shortest = min(map(len, split))
    if all(len(parts) == shortest for parts in split):
        kept = [n for n in range(shortest) if len({parts[n] for parts in split}) > 1]
        return [".".join(parts[n] for n in kept) for parts in split]
    front = 0
    while front < shortest - 1 and len({parts[front] for parts in split}) == 1:
        front += 1
    return [".".join(parts[front:]) for parts in split]


def _grid(weights: Weights, experts: Sequence[str], panel: str) -> np.ndarray[Any, Any]:
    """``[experts, sites]``."""
    where = f" of {panel!r}" if panel else ""
    if not weights or not experts:
        raise LoraweaveError(f"heat map{where}: expected at least one site and one expert")
    for site, values in weights.items():
        if len(values) != len(experts):
            raise LoraweaveError(
                f"heat map{where}: site {site!r} has {len(values)} weights; expected {len(experts)}, one per expert"
            )
    grid = np.array([[float(value) for value in values] for values in weights.values()]).T
    if not np.isfinite(grid).all():
        raise LoraweaveError(f"heat map{where}: weights must be finite numbers")
    return grid


def _common_sites(panels: Mapping[str, Weights]) -> list[str]:
    if not panels:
        raise LoraweaveError("heat maps: expected at least one panel")
    sites = list(next(iter(panels.values())))
    for name, weights in panels.items():
        if list(weights) != sites:
            raise LoraweaveError(f"heat maps: {name!r} has other sites than the first panel; expected the same ones")
    return sites


def _limits(
    grids: Mapping[str, np.ndarray[Any, Any]], lowest: float | None, highest: float | None
) -> tuple[float, float]:
    smallest = min(float(grid.min()) for grid in grids.values())
    largest = max(float(grid.max()) for grid in grids.values())
    if smallest < 0 and lowest is None and highest is None:
        largest = max(largest, -smallest)
        return -largest, largest
    low = lowest if lowest is not None else min(0.0, smallest)
    high = highest if highest is not None else largest
    return low, high if high > low else low + 1.0


def _columns(panels: int, width: float, height: float) -> int:
    """The number of panels in a row that makes the whole about 1.4 times as wide as high."""
    return min(range(1, panels + 1), key=lambda n: abs(math.log(n * width / (math.ceil(panels / n) * height) / 1.4)))


def _slanted(labels: Sequence[str], cell_width: float) -> bool:
    return max(map(len, labels)) * _LETTER > cell_width * 0.95


def _ticks(axes: Axes, sites: Sequence[str] | None, experts: Sequence[str] | None, cell: tuple[float, float]) -> None:
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    if sites is not None:
        upright = _slanted(sites, cell[0])
        # Every name where there is room for its height (standing) or its width (lying); else every second, fifth ...
        step = next(n for n in (1, 2, 5, 10, 20, 50, 100, len(sites)) if n * cell[0] >= 0.13 or n == len(sites))
        chosen = range(0, len(sites), step)
        axes.set_xticks(list(chosen), [sites[n] for n in chosen], rotation=90 if upright else 0)
        axes.set_xlabel("gate site, first to last", fontsize=9)
    if experts is not None:
        step = max(1, math.ceil(0.13 / cell[1]))
        chosen = range(0, len(experts), step)
        axes.set_yticks(list(chosen), [experts[n] for n in chosen])


def _frame_row(axes: Axes, row: int, sites: int, *, bold: bool) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((-0.5, row - 0.5), sites, 1, fill=False, edgecolor="#ff4f5e", linewidth=1.8, clip_on=False)
    )
    if bold:
        for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
            if tick == row:
                label.set_fontweight("bold")


def _numbers(axes: Axes, image: Any, grid: np.ndarray[Any, Any], cell: tuple[float, float]) -> None:
    if cell[0] < 0.38 or cell[1] < 0.2:
        return
    digits = 2 if float(np.abs(grid).max()) < 10 else 1
    for (row, column), value in np.ndenumerate(grid):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )


def _curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panel -> line -> ``(step, value)`` pairs."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in ("loss", *_PANEL_OF.values())}
    for entry in log_history:
        for name, value in entry.items():
            kind = name.split("/")[0]
            panel = next((p for part, p in _PANEL_OF.items() if part in kind), None)
            # transformers ends with the mean loss over all of training: no point of the curve.
            if panel and name != "train_loss" and "step" in entry and isinstance(value, int | float):
                panels[panel].setdefault(name, []).append((float(entry["step"]), float(value)))
    return panels


# Looked up in this order: a balance loss is a loss too.
_PANEL_OF = {"balance": "balance loss", "entropy": "entropy", "load": "load", "loss": "loss"}


def _lines(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines by name; ``kind/part`` is thin and coloured, and of many parts only the first and the last are named."""
    from matplotlib import colormaps

    parts = [name for name in lines if "/" in name]
    few = len(parts) <= 10
    # Ten colours told apart by their number, or one scale.
    colours = colormaps["tab10"](range(10)) if few else colormaps["viridis"](np.linspace(0, 0.92, len(parts)))
    for name, colour in zip(parts, colours, strict=False):
        label = name.split("/", 1)[1] if few or name in (parts[0], parts[-1]) else None
        axes.plot(*zip(*lines[name], strict=True), color=colour, label=label, linewidth=0.9)
    for name, points in lines.items():
        if name not in parts:
            # A single evaluation is a point, which a line would not show.
            marker = "o" if len(points) < 3 else None
            label = f"{name}, mean" if parts else name
            axes.plot(
                *zip(*points, strict=True), color="black" if parts else None, label=label, linewidth=1.8, marker=marker
            )
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    known = figure.canvas.get_supported_filetypes()
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    if ending not in known:
        raise LoraweaveError(f"cannot draw {os.fspath(path)!r}: expected a file name that ends in .png, .pdf or .svg")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor="white", bbox_inches="tight", pad_inches=0.12)
