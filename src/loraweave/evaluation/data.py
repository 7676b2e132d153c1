"""Examples: what a model reads, what it should answer, and which other answers are right too."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loraweave.errors import LoraweaveError


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a task.

    Attributes:
        input: what the model reads.
        target: the answer to train on.
        references: every right answer, ``target`` first; never empty.
    """

    input: str
    target: str
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", tuple(dict.fromkeys((self.target, *self.references))))


ExampleSource: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example]


def read_examples(source: ExampleSource, *, limit: int | None = None) -> list[Example]:
    """The examples in ``source``, in its order.

    A row has ``input`` and ``target``, both text, and may have ``references`` (or ``answers``), a list of further
    right answers. Other fields are ignored. Blank lines of a file are skipped.

    Args:
        source: a file with one JSON object a line, or anything that yields rows: a list of dicts, a
            ``datasets.Dataset``, a list of :class:`Example`.
        limit: read this many rows at most.

    Raises:
        LoraweaveError: the file is missing, empty, not UTF-8 or not JSON lines, or a row lacks a field or has one of
            the wrong type; the message names file and line (or the row, counted from 1).
    """
    if limit is not None and limit < 1:
        raise LoraweaveError(f"limit: expected a number of rows of at least 1, got {limit}")
    if isinstance(source, str | os.PathLike):
        rows, name = read_rows(source), f"the file {os.fspath(source)!r}"
    elif isinstance(source, Mapping):
        keys = ", ".join(map(str, source)) or "none"
        raise LoraweaveError(f"expected rows, got a mapping with the keys {keys}; choose one split, e.g. data['train']")
    else:
        rows, name = _numbered(source), "the data"
    examples = [_example(row, where) for where, row in itertools.islice(rows, limit)]
    if not examples:
        raise LoraweaveError(f"{name} is empty: expected at least one row with 'input' and 'target'")
    return examples


def _numbered(source: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    try:
        rows = iter(source)
    except TypeError as error:
        kind = type(source).__name__
        raise LoraweaveError(f"expected a .jsonl file or rows of data, got {kind} ({_short(source)})") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def read_rows(source: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """``(file:line, parsed row)`` of a JSON lines file.

    Raises:
        LoraweaveError: the file is missing, cannot be read, is not UTF-8 or not JSON lines.
    """
    path = Path(source)
    try:
        # A mark at the start of the file is what some Windows editors leave: not part of the data.
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except FileNotFoundError as error:
        raise LoraweaveError(f"no such data file: {str(path)!r}; expected JSON lines") from error
    except UnicodeDecodeError as error:
        raise LoraweaveError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise LoraweaveError(f"cannot read the data file {str(path)!r}: {error.strerror or error}") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise LoraweaveError(f"{where}: not JSON ({detail}); expected one object a line") from error


def _example(row: Any, where: str) -> Example:
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise LoraweaveError(f"{where}: expected an object with 'input' and 'target', got {kind} ({_short(row)})")
    text, target = _text(row, "input", where), _text(row, "target", where)
    if not text.strip():
        raise LoraweaveError(f"{where}: 'input' is blank; expected what the model is to read")
    name = "references" if row.get("references") is not None else "answers"
    others = row.get(name)
    if others is None:
        return Example(text, target)
    if not isinstance(others, list | tuple) or not all(isinstance(other, str) for other in others):
        raise LoraweaveError(f"{where}: {name!r} must be a list of texts, got {_short(others)}")
    return Example(text, target, tuple(others))


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise LoraweaveError(f"{where}: no {key!r}; the row has {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, str):
        raise LoraweaveError(f"{where}: {key!r} must be text, got {type(value).__name__} ({_short(value)})")
    return value


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
