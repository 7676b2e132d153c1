"""Do two columns of scores agree? Pearson, Spearman and Kendall, for any table, as in a study with people.

With numpy alone: scipy would be a large dependency for three formulas.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.errors import LoraweaveError, unknown
from loraweave.evaluation.data import read_rows

LARGEST = 5000
"""Rows; Kendall's coefficient looks at every two of them."""


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r: how well a straight line fits, -1 to 1.

    Raises:
        LoraweaveError: unequal numbers of values, fewer than two, one that is not finite, or all of one side equal.
    """
    a, b = _columns(x, y)
    return _bounded(float(_direction(a) @ _direction(b)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: Pearson's r of the ranks; equal values share the mean of their ranks. Raises as
    :func:`pearson`."""
    a, b = _columns(x, y)
    return pearson(ranks(a), ranks(b))


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: ``(C - D) / sqrt((P - Tx) (P - Ty))`` of all ``P`` pairs of rows, ``C`` in the same order on
    both sides, ``D`` in opposite ones, ``Tx`` equal in x, ``Ty`` equal in y (Kendall 1945). Raises as :func:`pearson`.
    """
    a, b = _columns(x, y)
    if len(a) > LARGEST:
        raise LoraweaveError(f"kendall: expected at most {LARGEST} rows, got {len(a)}; take a sample of them")
    both = in_x = in_y = 0
    for n in range(len(a) - 1):
        s, t = np.sign(a[n + 1 :] - a[n]), np.sign(b[n + 1 :] - b[n])
        both += int(s @ t)
        in_x += int(np.count_nonzero(s))
        in_y += int(np.count_nonzero(t))
    return _bounded(both / math.sqrt(in_x * in_y))


def ranks(values: Sequence[float] | np.ndarray[Any, Any]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return [float(rank) for rank in (last - (counts - 1) / 2)[inverse]]


def agreement(table: Mapping[str, Sequence[float]], reference: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """How each of ``columns`` agrees with ``reference``.

    Args:
        table: column -> values, as from :func:`read_table`.
        reference: the column to compare with, e.g. what people said.
        columns: those to compare; default: all others.

    Returns:
        Column -> ``pearson``, ``spearman``, ``kendall`` and ``n``; None, as nothing is defined, where all values of the
        column are equal.

    Raises:
        LoraweaveError: an unknown column, one that cannot be compared, or nothing to compare; all values of
            ``reference`` are equal.
    """
    chosen = list(columns) or [name for name in table if name != reference]
    for name in (reference, *chosen):
        if name not in table:
            raise unknown("column", name, table)
    if not chosen:
        raise LoraweaveError(f"nothing to compare with {reference!r}: no other column has a number in every row")
    found: dict[str, Any] = {}
    for name in chosen:
        try:
            x, y = table[reference], table[name]
            if len(set(y)) == 1 < len(set(x)) and len(x) == len(y):
                found[name] = {"pearson": None, "spearman": None, "kendall": None, "n": len(x)}
                continue
            found[name] = {"pearson": pearson(x, y), "spearman": spearman(x, y), "kendall": kendall(x, y), "n": len(x)}
        except LoraweaveError as error:
            raise LoraweaveError(f"{reference!r} and {name!r}: {error}") from error
    return found


def read_table(path: str | Path, columns: Sequence[str] = ()) -> dict[str, list[float]]:
    """Columns of numbers from a ``.csv`` file with a header, or from ``.jsonl``.

    Args:
        path: the file.
        columns: which; every row must have a number there. Default: those that are numbers in every row.

    Raises:
        LoraweaveError: the file cannot be read, an unknown column, a row without a number, or no column of numbers.
    """
    rows = list(_csv(Path(path)) if str(path).lower().endswith(".csv") else read_rows(path))
    if not rows:
        raise LoraweaveError(f"{path}: no rows; expected a table of scores")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise LoraweaveError(f"{where}: expected an object, column: number")
    known = list(dict.fromkeys(str(name) for _, row in rows for name in row))
    for name in columns:
        if name not in known:
            raise unknown(f"column of {str(path)!r}", name, known)
    table: dict[str, list[float]] = {}
    for name in columns or known:
        values = [(where, _number(row.get(name))) for where, row in rows]
        missing = next((where for where, value in values if value is None), None)
        if missing is None:
            table[name] = [value for _, value in values if value is not None]
        elif columns:
            raise LoraweaveError(f"{missing}: no number in the column {name!r}; mend or leave out that row")
    if not table:
        raise LoraweaveError(f"{path}: no column has a number in every row (columns: {', '.join(known)})")
    return table


def _csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise LoraweaveError(f"{path}: two columns have the same name; rename one")
            return [(f"{path}:{reader.line_num}", {k: v for k, v in row.items() if k is not None}) for row in reader]
    except FileNotFoundError as error:
        raise LoraweaveError(f"no such table: {str(path)!r}; expected .csv or .jsonl") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LoraweaveError(f"cannot read the table {str(path)!r}: {error}") from error


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _columns(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise LoraweaveError(f"expected as many values on both sides, at least two, got {a.size} and {b.size}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise LoraweaveError("expected finite numbers on both sides")
    for side in (a, b):
        if (side == side[0]).all():
            raise LoraweaveError(f"all values of one side are {side[0]:g}, so nothing can vary with it")
    return a, b


def _direction(column: np.ndarray[Any, Any]) -> Any:
    """Deviations from the mean, of length 1."""
    centred = _near_one(column) - _near_one(column).mean()
    return _near_one(centred) / np.linalg.norm(_near_one(centred))


def _near_one(column: np.ndarray[Any, Any]) -> Any:
    """Times a power of two, which rounds nothing: sums of 1e308 and squares of 1e-200 leave the range of floats."""
    _, exponent = np.frexp(np.abs(column).max())
    return np.ldexp(column, -exponent)


def _bounded(value: float) -> float:
    """A perfect coefficient comes out a rounding error beside 1."""
    return max(-1.0, min(1.0, value))
