"""Line charts as inline SVG: their colours and text follow the page's style, their names are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38
_COLOURS = 8
GUIDE = "4 4"
"""Dashes of lines that only guide the eye."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: shown when the pointer rests on it, and in legends.
        points: ``(x, y)`` from left to right.
        colour: any CSS colour, e.g. ``var(--c1)``.
        thick: whether it stands out.
        dash: lengths of dashes and gaps, as SVG has them; empty for a whole line.
        spread: for each point how far a band reaches to both sides; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    thick: bool = False
    dash: str = ""
    spread: Sequence[float] = ()

    @property
    def key(self) -> Markup:
        """A piece of the line, for legends."""
        return Markup(f'<svg class="key" viewBox="0 0 30 8" aria-hidden="true">{self.drawn("M1 4H29")}</svg>')

    def drawn(self, path: str, title: str = "") -> str:
        """The line along ``path``."""
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        inside = f"<title>{escape(title)}</title>" if title else ""
        kind = "line thick" if self.thick else "line"
        return f'<path class="{kind}" style="stroke:{self.colour}"{dash} d="{path}">{inside}</path>'


def look(number: int) -> dict[str, str]:
    """Colour and dashes of line ``number``, unlike those of any other: eight colours, then the same in dashes, then in
    dashes and a dot, and so on."""
    turn = number // _COLOURS
    return {"colour": f"var(--c{number % _COLOURS})", "dash": "7 3" + " 1.5 3" * (turn - 1) if turn else ""}


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
        parts.append(line.drawn(_path(places), line.name))
        if logarithmic or len(places) == 1:
            parts += [
                f'<circle style="fill:{line.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>{escape(line.name)}: {value:.3g} at {where:g}</title></circle>"
                for (a, b), (where, value) in zip(places, line.points, strict=True)
            ]
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
