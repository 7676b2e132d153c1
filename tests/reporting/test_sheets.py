"""Contact sheets: every picture stands where its row and column are."""

from __future__ import annotations

from PIL import Image

from loraweave.reporting.sheets import contact_sheet


def flat(colour: str, size: tuple[int, int] = (8, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_places_and_enlargement() -> None:
    rows = [[flat("red"), flat("green")], [flat("blue"), flat("yellow")]]
    sheet = contact_sheet(rows, ["a", "b"], ["", ""], scale=3)
    assert sheet.size == (2 * (24 + 4), 16 + 2 * (12 + 4))
    found = [sheet.getpixel((x, y)) for y in (16, 16 + 16 + 11) for x in (0, 28 + 23)]
    assert found == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0)]
    assert sheet.getpixel((24, 16)) == (255, 255, 255)


def test_captions_take_a_line_and_long_labels_widen_columns() -> None:
    plain = contact_sheet([[flat("red")]], ["a"], [""])
    captioned = contact_sheet([[flat("red")]], ["a" * 30], ["what it shows"])
    assert captioned.height == plain.height + 16
    assert captioned.width > 150
    assert captioned.getpixel((0, 32)) == (255, 0, 0)
