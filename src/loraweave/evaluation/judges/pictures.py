"""What is to be judged: rows of pictures that several methods made of the same elements.

One JSON object a line; paths are relative to the file::

    {"id": "hero_coat", "elements": [{"name": "hero", "features": ["red hair"]}, {"name": "coat"}],
     "pictures": {"switch": "switch/hero_coat.png", "merge": "merge/hero_coat.png"}}
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraweave.errors import LoraweaveError, unknown
from loraweave.evaluation.data import read_rows

LARGEST = 20_000_000
"""Bytes of a picture; servers take no larger ones."""
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


@dataclass(frozen=True)
class Element:
    """Something that a picture should show, and what it is known by."""

    name: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The pictures that several methods made of the same elements."""

    id: str
    elements: tuple[Element, ...]
    pictures: Mapping[str, Path]


@dataclass(frozen=True)
class Pair:
    """Two methods' pictures of the same elements; ``a`` and ``b`` are the methods' names."""

    id: str
    elements: tuple[Element, ...]
    a: str
    b: str
    pictures: Mapping[str, Path]


def read_pictures(path: str | Path) -> list[Row]:
    """The rows of a ``.jsonl`` file.

    Raises:
        LoraweaveError: the file cannot be read, a row lacks something or has an id twice, or a picture is missing.
    """
    folder, rows = Path(path).parent, []
    seen: set[str] = set()
    for where, row in read_rows(path):
        if not isinstance(row, Mapping):
            raise LoraweaveError(f"{where}: expected an object with 'id', 'elements' and 'pictures'")
        name = row.get("id")
        if not isinstance(name, str) or not name or name in seen:
            raise LoraweaveError(f"{where}: 'id' must be a text that no other row has, got {name!r}")
        seen.add(name)
        rows.append(Row(name, _elements(row.get("elements"), where), _pictures(row.get("pictures"), folder, where)))
    if not rows:
        raise LoraweaveError(f"{path}: no pictures; expected rows with 'id', 'elements' and 'pictures'")
    return rows


def pairs(rows: Sequence[Row], methods: Sequence[str] = ()) -> list[Pair]:
    """Every two methods of every row, in the order of ``methods``, or of the first row.

    Raises:
        LoraweaveError: an unknown or repeated method, a single one, or a row that lacks one of them.
    """
    known = list(dict.fromkeys(method for row in rows for method in row.pictures))
    for method in methods:
        if method not in known:
            raise unknown("method", method, known)
    chosen = list(methods or known)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise LoraweaveError(f"expected at least two different methods to compare, got {', '.join(chosen) or 'none'}")
    for row in rows:
        for method in chosen:
            if method not in row.pictures:
                raise LoraweaveError(
                    f"row {row.id!r}: no picture of {method!r}; every row must have one of each method"
                )
    return [
        Pair(row.id, row.elements, a, b, row.pictures) for row in rows for a, b in itertools.combinations(chosen, 2)
    ]


def read_picture(path: Path) -> tuple[bytes, str]:
    """The bytes of a picture and their kind, ``image/png``, ``image/jpeg`` or ``image/webp``.

    Raises:
        LoraweaveError: it cannot be read, is larger than 20 MB, or is none of those.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise LoraweaveError(f"cannot read the picture {str(path)!r}: {error.strerror or error}") from error
    if len(content) > LARGEST:
        raise LoraweaveError(f"the picture {str(path)!r} has more than {LARGEST:,} bytes; make it smaller")
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    if kind is None or (kind == "image/webp" and content[8:12] != b"WEBP"):
        raise LoraweaveError(f"the file {str(path)!r} is no picture; expected PNG, JPEG or WebP")
    return content, kind


def digest(path: Path) -> str:
    """The sha256 of a picture's bytes."""
    return hashlib.sha256(read_picture(path)[0]).hexdigest()


def _elements(given: Any, where: str) -> tuple[Element, ...]:
    if not isinstance(given, list) or not given:
        raise LoraweaveError(f"{where}: 'elements' must be a list of at least one element, got {given!r}")
    found = []
    for element in given:
        one = {"name": element} if isinstance(element, str) else element
        features = one.get("features", []) if isinstance(one, Mapping) else None
        if (
            not isinstance(one, Mapping)
            or not isinstance(one.get("name"), str)
            or not isinstance(features, list)
            or not all(isinstance(feature, str) for feature in features)
        ):
            raise LoraweaveError(f"{where}: an element must be {{'name': text, 'features': [texts]}}, got {element!r}")
        found.append(Element(str(one["name"]), tuple(features)))
    return tuple(found)


def _pictures(given: Any, folder: Path, where: str) -> dict[str, Path]:
    if not isinstance(given, Mapping) or not given or not all(isinstance(path, str) for path in given.values()):
        raise LoraweaveError(f"{where}: 'pictures' must be {{method: file}}, got {given!r}")
    found = {str(method): folder / path for method, path in given.items()}
    for path in found.values():
        if not path.is_file():
            raise LoraweaveError(f"{where}: no such picture: {str(path)!r}")
    return found
