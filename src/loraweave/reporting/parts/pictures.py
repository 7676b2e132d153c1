"""Pictures inside a page: made small, and only some of many."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loraweave.errors import LoraweaveError

PICTURES = 72
"""Pictures of one contact sheet, and of a page three times as many."""
ROWS = 12
_LARGEST_FILE = 100_000_000
# Pixels of the longer side: sharp where pages show it, also on dense screens.
_SIDE, _SHEET_SIDE = 320, 1800
# Pictures of fewer pixels a side are shown as they are, pixel by pixel.
TINY = 96
T = TypeVar("T")


def sheet(
    rows: Sequence[tuple[str, Mapping[str, Path]]], columns: Sequence[str], most: int = PICTURES
) -> dict[str, Any]:
    """A contact sheet: rows with a caption and a picture for each column, where there is one.

    Args:
        rows: caption, and column -> file.
        columns: from left to right.
        most: pictures there may be about; of more rows some are taken, evenly spread.

    Raises:
        LoraweaveError: a picture cannot be read.
    """
    shown = spread(rows, max(1, min(ROWS, most // max(1, len(columns)))))
    cells = [
        {"caption": caption, "cells": [embedded(files[c]) if c in files else None for c in columns]}
        for caption, files in shown
    ]
    return {"columns": list(columns), "rows": cells, "left_out": len(rows) - len(shown)}


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of them, evenly spread."""
    if len(items) <= limit:
        return list(items)
    return [items[n * len(items) // limit] for n in range(limit)]


def embedded(path: Path, side: int = _SIDE) -> dict[str, Any]:
    """A picture as a ``data:`` address: ``source``, ``width``, ``height``, and whether it is ``tiny``.

    It is read and written anew, so that nothing but a picture gets into a page: small ones as PNG, larger ones as JPEG,
    no longer than ``side``.

    Raises:
        LoraweaveError: it is missing, larger than 100 MB, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise LoraweaveError(f"the picture {str(path)!r} has more than {_LARGEST_FILE:,} bytes; make it smaller")
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraweaveError(f"cannot read the picture {str(path)!r}: {reason}; expected PNG, JPEG or WebP") from error
    # What is transparent is white, as on a sheet of paper.
    paper = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(paper, picture).convert("RGB")
    tiny = max(picture.size) <= TINY
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if tiny:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="JPEG", quality=84, optimize=True)
    kind = "image/png" if tiny else "image/jpeg"
    return {
        "source": as_data(file.getvalue(), kind),
        "width": picture.width,
        "height": picture.height,
        "tiny": tiny,
    }


def whole_sheet(path: Path) -> dict[str, Any]:
    """A contact sheet that a command drew. Raises as :func:`embedded`."""
    return embedded(path, _SHEET_SIDE)


def as_data(content: bytes, kind: str) -> str:
    """A ``data:`` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
