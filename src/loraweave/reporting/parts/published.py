"""A paper's figures beside ours, as a table of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave.reporting.published import HERE, PAPER, digits_of, published_rows, stand_in

# Where there are no more columns than this, methods are the rows.
_FEW = 4
_WORDS = {"text_alignment": "text alignment", "image_alignment": "image alignment", "distinctness": "distinctness"}


def figures(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Names across and down, and pairs of figures as text, the paper's and ours; None where the recipe has none.

    Args:
        results: the content of ``results.json`` or ``alignment.json``.
    """
    rows = published_rows(results)
    if all(row[side] is None for row in rows for side in (PAPER, HERE)):
        return None
    # Of a test bed: measures, not tasks.
    word = stand_in if "retention" in results else lambda row: measure(row["column"])
    digits = {c: digits_of([row for row in rows if row["column"] == c]) for c in {row["column"] for row in rows}}
    words = {row["column"]: word(row) for row in rows}
    pairs = {
        (words[column], row["method"]): [
            None if row[side] is None else f"{row[side]:.{digits[column]}f}" for side in (PAPER, HERE)
        ]
        for row in rows
        for column in [row["column"]]
    }
    columns = [c for c in dict.fromkeys(c for c, _ in pairs) if any(any(p) for (of, _), p in pairs.items() if of == c)]
    methods = list(dict.fromkeys(method for _, method in pairs))
    upright = len(columns) <= _FEW
    across, down = (columns, methods) if upright else (methods, columns)
    published = results["recipe"]["published"]
    return {
        "source": published["source"],
        "note": published.get("note"),
        "small": results["recipe"].get("base") in ("zoo", "zoo:images"),
        "across": across,
        "rows": [(name, [pairs[(other, name) if upright else (name, other)] for other in across]) for name in down],
    }


def measure(name: str) -> str:
    """``dino_image_alignment_boot`` in words."""
    if name == "all":
        return "all elements"
    space = "DINO " if name.startswith("dino_") else ""
    plain = name.removeprefix("dino_")
    for start, words in _WORDS.items():
        if plain == start:
            return space + words
        if plain.startswith(f"{start}_"):
            return f"{space}{words}: {plain.removeprefix(f'{start}_')}"
    return name
