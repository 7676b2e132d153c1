"""Points and ticks stand where they belong, and lines can be told apart."""

from __future__ import annotations

import pytest

from loraweave.reporting.charts import HEIGHT, WIDTH, Line, line_chart, look, nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 2.08, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (1, 20, [0.0, 5.0, 10.0, 15.0, 20.0]),
        (-3, 3, [-4.0, -2.0, 0.0, 2.0, 4.0]),
        (5.0, 5.0, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    if low < high:
        assert found == pytest.approx(ticks)


def test_points_stand_where_they_belong() -> None:
    """Plot area: 46 to 408 across, 212 down to 12."""
    assert (WIDTH, HEIGHT) == (420, 250)
    chart = line_chart([Line("a<b", [(0, 0.0), (5, 1.0), (10, 0.5)], "red", spread=[0, 0, 0])], "x", "y")
    assert "M46.0 212.0L227.0 12.0L408.0 112.0" in chart
    assert "a&lt;b" in chart
    doubled = line_chart([Line("n", [(2, 0.0), (8, 1.0), (32, 1.0)], "red")], "x", "y", logarithmic=True)
    assert "M46.0 212.0L227.0 12.0L408.0 12.0" in doubled


def test_no_two_lines_look_alike() -> None:
    looks = [tuple(sorted(look(number).items())) for number in range(40)]
    assert len(set(looks)) == 40
    assert all(look(number)["dash"] == "" for number in range(8))
    lines = [Line(f"m{n}", [(2, 0.1 * n), (8, 0.1)], thick=True, **look(n)) for n in range(20)]
    drawn = line_chart(lines, "x", "y")
    for number, line in enumerate(lines):
        dash = f' stroke-dasharray="{look(number)["dash"]}"' if look(number)["dash"] else ""
        stroke = f'style="stroke:{look(number)["colour"]}"{dash} d="'
        assert stroke in drawn
        assert stroke in line.key


def test_points_on_a_logarithmic_axis_say_what_they_are() -> None:
    chart = line_chart([Line("a<b", [(2, 0.25), (8, 1.0)], "red")], "x", "y", logarithmic=True)
    assert "<title>a&lt;b: 0.25 at 2</title>" in chart
    assert "<title>a&lt;b: 1 at 8</title>" in chart


def test_bands_reach_as_far_to_both_sides() -> None:
    """From 0 to 1 the axis has 200 units."""
    line = Line("n", [(0, 0.5), (10, 0.5)], "red", spread=[0.1, 0.2])
    chart = line_chart([line, Line("top", [(0, 1.0), (10, 1.0)], "red")], "x < 1", "y > 1")
    assert 'class="band" style="fill:red" d="M46.0 92.0L408.0 72.0L408.0 152.0L46.0 132.0Z"' in chart
    assert 'aria-label="y &gt; 1 by x &lt; 1"' in chart
