"""Contact sheets: pictures side by side, labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_LINE, _GAP, _LETTER = 16, 4, 6


def contact_sheet(
    rows: Sequence[Sequence[Image]], columns: Sequence[str], captions: Sequence[str], scale: int = 1
) -> Image:
    """A grid of pictures: a label over each column, and a caption over each row.

    Args:
        rows: pictures, as many in each as ``columns``.
        columns: what stands over the columns.
        captions: what stands over each row; empty ones take no place.
        scale: whole factor by which pictures are enlarged, pixel by pixel.
    """
    from PIL import Image, ImageDraw

    pictures = [picture for row in rows for picture in row]
    width = max(max(p.width * scale for p in pictures), _LETTER * max(len(label) for label in columns) + _GAP)
    height = max(p.height * scale for p in pictures)
    tops = [_LINE if caption else 0 for caption in captions]
    whole = Image.new("RGB", (len(columns) * (width + _GAP), _LINE + sum(tops) + len(rows) * (height + _GAP)), "white")
    draw = ImageDraw.Draw(whole)
    for column, label in enumerate(columns):
        draw.text((column * (width + _GAP) + 2, 2), label, fill="black")
    y = _LINE
    for row, caption, top in zip(rows, captions, tops, strict=True):
        draw.text((2, y + 2), caption, fill="grey")
        for column, picture in enumerate(row):
            size = (picture.width * scale, picture.height * scale)
            enlarged = picture.resize(size, Image.Resampling.NEAREST) if scale > 1 else picture
            whole.paste(enlarged, (column * (width + _GAP), y + top))
        y += top + height + _GAP
    return whole
