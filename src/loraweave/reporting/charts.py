"""Line charts as inline SVG: their colours and text follow the page's style, their names are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: shown when the pointer rests on it, and in legends.
        points: ``(x, y)`` from left to right.
        colour: any CSS colour, e.g. ``var(--c1)``.
        thick: whether it stands out.
        dashed: for lines that only guide the eye.
        spread: for each point how far a band reaches to both sides; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    thick: bool = False
    dashed: bool = False
    spread: Sequence[float] = ()


def line_chart(lines: Sequence[Line], x: str, y: str, *, logarithmic: bool = False, low: float | None = 0.0) -> Markup:
    """A chart of at least one line with at least one point.

    Args:
        lines: the later ones lie above.
        x: below the horizontal axis.
        y: what it shows, for those who cannot see it; pages write it above.
        logarithmic: horizontal axis with a tick at every x there is.
        low: where the vertical axis begins at the latest; None: at the lowest point.
    """
    xs = sorted({point[0] for line in lines for point in line.points})
    ends = [
        value + side * (line.spread[n] if line.spread else 0.0)
        for line in lines
        for n, (_, value) in enumerate(line.points)
        for side in (-1, 1)
    ]
    ticks = nice_ticks(min([*ends, *([] if low is None else [low])]), max(ends))
    bottom, top = min(ticks[0], *ends), max(ticks[-1], *ends)
    first, last = xs[0], xs[-1]
    scale = math.log if logarithmic else float

    def across(value: float) -> float:
        share = 0.5 if last == first else (scale(value) - scale(first)) / (scale(last) - scale(first))
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {up(tick):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in xs if logarithmic else [t for t in nice_ticks(first, last) if first <= t <= last]:
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    )
    for line in lines:
        places = [(across(a), up(b)) for a, b in line.points]
        if any(line.spread):
            over = [(across(a), up(b + s)) for (a, b), s in zip(line.points, line.spread, strict=True)]
            under = [(across(a), up(b - s)) for (a, b), s in zip(line.points, line.spread, strict=True)]
            parts.append(f'<path class="band" style="fill:{line.colour}" d="{_path([*over, *reversed(under)])}Z"/>')
        kind = " ".join(["line", *(["thick"] if line.thick else []), *(["dashed"] if line.dashed else [])])
        parts.append(
            f'<path class="{kind}" style="stroke:{line.colour}" d="{_path(places)}"><title>{escape(line.name)}</title>'
            "</path>"
        )
        if logarithmic or len(places) == 1:
            parts += [f'<circle style="fill:{line.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
    return Markup("".join(parts) + "</svg>")


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, about as many as asked for, at least two."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(start, end + 1)]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
