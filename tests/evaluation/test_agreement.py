"""Pearson, Spearman and Kendall against tables worked by hand and slow loops."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.evaluation.agreement import agreement, kendall, pearson, ranks, read_table, spearman

X = [1.0, 2.0, 3.0, 4.0, 5.0]
Y = [2.0, 1.0, 4.0, 3.0, 5.0]


def test_by_hand() -> None:
    # Deviations (-2 -1 0 1 2) and (-1 -2 1 0 2): products sum to 8, squares to 10 and 10.
    assert pearson(X, Y) == pytest.approx(0.8)
    # Already ranks.
    assert spearman(X, Y) == pytest.approx(0.8)
    # Two of the ten pairs are in opposite order: (8 - 2) / 10.
    assert kendall(X, Y) == pytest.approx(0.6)


def test_ties_by_hand() -> None:
    x, y = [1, 2, 2, 3], [1, 2, 3, 3]
    assert ranks(x) == [1, 2.5, 2.5, 4]
    # Ranks (1 2.5 2.5 4) and (1 2 3.5 3.5), means 2.5: 2.25 + 0 + 0 + 1.5 over sqrt(4.5 * 4.5).
    assert spearman(x, y) == pytest.approx(3.75 / 4.5)
    # Six pairs: one tied in x, one in y, four in the same order: 4 / sqrt(5 * 5).
    assert kendall(x, y) == pytest.approx(0.8)
    # Deviations (-1 0 0 1) and (-1.25 -0.25 0.75 0.75): 2 over sqrt(2 * 2.75).
    assert pearson(x, y) == pytest.approx(2 / math.sqrt(5.5))


values = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=20)


@given(values)
def test_kendall_and_spearman_as_slow_loops(rows: list[tuple[int, int]]) -> None:
    x, y = [a for a, _ in rows], [b for _, b in rows]
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(LoraweaveError, match="all values of one side"):
            kendall(x, y)
        return
    same = opposite = in_x = in_y = total = 0
    for (a, b), (c, d) in itertools.combinations(rows, 2):
        total += 1
        in_x += a == c
        in_y += b == d
        same += (a - c) * (b - d) > 0
        opposite += (a - c) * (b - d) < 0
    assert kendall(x, y) == pytest.approx((same - opposite) / math.sqrt((total - in_x) * (total - in_y)))
    slow = [[sum(v < one for v in side) + (sum(v == one for v in side) + 1) / 2 for one in side] for side in (x, y)]
    assert [ranks(x), ranks(y)] == slow
    means = [sum(side) / len(side) for side in slow]
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(*slow, strict=True))
    squares = [sum((v - m) ** 2 for v in side) for side, m in zip(slow, means, strict=True)]
    assert spearman(x, y) == pytest.approx(products / math.sqrt(squares[0] * squares[1]))


def test_bounds_and_invariances() -> None:
    draw = random.Random(0)
    x = [draw.random() for _ in range(50)]
    y = [a + draw.random() for a in x]
    for coefficient in (pearson, spearman, kendall):
        assert coefficient(x, x) == pytest.approx(1)
        assert coefficient(x, [-a for a in x]) == pytest.approx(-1)
        assert coefficient(x, y) == pytest.approx(coefficient(y, x))
        assert coefficient(x, [3 * b - 1 for b in y]) == pytest.approx(coefficient(x, y))
    for coefficient in (spearman, kendall):
        assert coefficient(x, [math.exp(b) for b in y]) == pytest.approx(coefficient(x, y))
    assert pearson([1e200, 2e200, 4e200], [1e-200, 2e-200, 4e-200]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [1, 2, 3], "as many values on both sides, at least two, got 2 and 3"),
        ([1], [1], "at least two"),
        ([1, math.nan], [1, 2], "finite"),
        ([1, 2], [5, 5], "all values of one side are 5"),
    ],
)
def test_what_cannot_be_compared(x: list[float], y: list[float], said: str) -> None:
    for coefficient in (pearson, spearman, kendall):
        with pytest.raises(LoraweaveError, match=said):
            coefficient(x, y)


CSV = "picture,people,judge,note\na,1,2,x\nb,2,1,\nc,3,4,\nd,4,3,\ne,5,5,7\n"


def test_tables_from_csv_and_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(CSV)
    assert read_table(path) == {"people": X, "judge": Y}
    rows = [{"people": a, "judge": b, "ok": True} for a, b in zip(X, Y, strict=True)]
    other = tmp_path / "scores.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    assert read_table(other) == {"people": X, "judge": Y}
    found = agreement(read_table(path), "people")
    assert found == {"judge": {"pearson": pytest.approx(0.8), "spearman": pytest.approx(0.8), "kendall": 0.6, "n": 5}}


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        (CSV, ["peple"], "did you mean 'people'"),
        (CSV, ["note"], ":2: no number in the column 'note'"),
        ("a,a\n1,2\n", [], "two columns have the same name"),
        ("a,b\n", [], "no rows"),
        ("a\nx\n", [], "no column has a number in every row"),
        ("a\ninf\n", ["a"], "no number in the column 'a'"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, columns: list[str], said: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(LoraweaveError, match=said):
        read_table(path, columns)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(CSV)
    assert main(["agree", str(path), "people"]) == 0
    assert "judge" in (said := capsys.readouterr().out)
    assert said.count("0.800") == 2
    assert main(["agree", str(path), "people", "judge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judge"]["kendall"] == pytest.approx(0.6)
    path.write_text("people,[/x]\n1,2\n2,1\n3,3\n")
    for reference in ("people", "[/x]"):
        assert main(["agree", str(path), reference]) == 0
        assert "[/x]" in capsys.readouterr().out
    path.write_text("people,note\n1,x\n2,y\n")
    assert main(["agree", str(path), "people"]) == 2
    assert "nothing to compare with 'people': no other column has a number in every row" in capsys.readouterr().err
    assert main(["agree", str(tmp_path / "none.csv"), "people"]) == 2
    assert "no such table" in capsys.readouterr().err


def test_a_column_that_never_varies_is_undefined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither nan nor the end of the table; but with such a reference there is nothing to say at all."""
    path = tmp_path / "scores.csv"
    path.write_text("people,judge,flat\n1,2,0.1\n2,1,0.1\n3,3,0.1\n")
    found = agreement(read_table(path), "people")
    assert found["flat"] == {"pearson": None, "spearman": None, "kendall": None, "n": 3}
    assert found["judge"]["pearson"] == pytest.approx(0.5)
    assert main(["agree", str(path), "people"]) == 0
    (flat,) = [line.split() for line in capsys.readouterr().out.splitlines() if "flat" in line]
    assert flat == ["flat", "undefined", "undefined", "undefined", "3"]
    assert main(["agree", str(path), "flat"]) == 2
    assert "all values of one side are 0.1" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1.0, 1e200, 3e307])
def test_pearson_at_the_ends_of_the_range(scale: float) -> None:
    """By hand 0.8, whatever one side is multiplied by; its sums and squares leave the range of floats."""
    assert pearson([scale * value for value in X], Y) == pytest.approx(0.8)
    assert pearson(Y, [-scale * value for value in X]) == pytest.approx(-0.8)
