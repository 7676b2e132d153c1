"""Heat maps: what each method's gates give to each expert, site by site (Fig. 7 of the MoLE paper)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.reporting.parts.pictures import as_data
from loraweave.reporting.plots import short_names

# Numbers stand in the cells of a heat map where it has no more columns than this.
_NUMBERED = 14
# A method with more cells than this, all tasks together, is drawn as pictures: a cell in HTML takes 100 bytes.
_CELLS = 4000
# Rows of pictures are named where there are no more than this.
_NAMED = 48
_PLUS, _MINUS = (13, 125, 119), (179, 84, 30)


def heat_maps(weights: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each method of ``weights.json`` its panels, the kept method first: experts by sites, one for each task.

    Each weight comes with its share of the strongest colour in percent. One panel where all tasks get the same.

    Raises:
        ValueError: a weight is not finite, or a site has not one weight per expert.
    """
    # Earlier versions wrote the kept method alone.
    methods = weights["methods"] if "methods" in weights else {weights["method"]: {"panels": weights["panels"]}}
    first = sorted(methods, key=lambda method: method != weights["method"])
    return [_method(method, methods[method]["panels"], list(weights["experts"])) for method in first]


def _method(method: str, panels: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str]) -> dict[str, Any]:
    if len(panels) > 1 and len({repr(sites) for sites in panels.values()}) == 1:
        panels = {"every task": next(iter(panels.values()))}
    values = [float(w) for sites in panels.values() for ws in sites.values() for w in ws]
    if not all(map(math.isfinite, values)):
        raise ValueError("a weight is not finite")
    top = max(map(abs, values), default=0.0) or 1.0
    drawn = len(values) > _CELLS
    sites = list(next(iter(panels.values()), {}))
    if any(list(of_sites) != sites for of_sites in panels.values()):
        raise ValueError(f"panels of {method} have different sites")
    return {
        "method": method,
        "panels": [
            {
                "name": name,
                "own": experts.index(name) if name in experts else None,
                "rows": None if drawn else _rows(of_sites, experts, top),
                "picture": _picture(of_sites, experts, top) if drawn else None,
            }
            for name, of_sites in panels.items()
        ],
        "experts": experts,
        "named": len(experts) <= _NAMED,
        "sites": list(zip(sites, short_names(sites) if sites else [], strict=True)),
        "numbers": len(sites) <= _NUMBERED,
        "top": f"{top:.2f}",
    }


def _rows(sites: Mapping[str, Sequence[float]], experts: Sequence[str], top: float) -> list[tuple[str, list[Any]]]:
    return [
        (
            expert,
            [{"weight": f"{w:.2f}", "share": round(100 * abs(w) / top), "minus": w < 0} for w in row],
        )
        for expert, row in zip(experts, _grid(sites, experts), strict=True)
    ]


def _picture(sites: Mapping[str, Sequence[float]], experts: Sequence[str], top: float) -> str:
    """A pixel per cell, as opaque as its weight is strong: what lies under it shows through, light or dark."""
    from PIL import Image

    picture = Image.new("RGBA", (len(sites), len(experts)))
    for y, row in enumerate(_grid(sites, experts)):
        for x, weight in enumerate(row):
            picture.putpixel((x, y), (*(_MINUS if weight < 0 else _PLUS), round(255 * abs(weight) / top)))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return as_data(file.getvalue(), "image/png")


def _grid(sites: Mapping[str, Sequence[float]], experts: Sequence[str]) -> list[list[float]]:
    """``[experts][sites]``."""
    if any(len(weights) != len(experts) for weights in sites.values()):
        raise ValueError(f"a site has other than {len(experts)} weights, one per expert")
    return [[float(weights[n]) for weights in sites.values()] for n in range(len(experts))]
