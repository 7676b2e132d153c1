"""The files that recipes want, and what is known of those that are there.

Beside the rows stands ``rows.json``: how each file was made, and its hash. By it a second run keeps what is done, and
notices what was made otherwise or changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from row_prompts import Item
from row_sets import SETS, PublicSet

from loraweave.errors import LoraweaveError, unknown
from loraweave.files import make_folder, write_json_atomic, write_text_atomic
from loraweave.recipe import load_recipe
from loraweave.recipe.parts import ZOO_PREFIX

RECORD = "rows.json"
_NAME = re.compile(r"(?P<name>.+)\.(?P<part>train|test)\.jsonl")


@dataclass(frozen=True)
class Wanted:
    """A file of rows.

    Attributes:
        path: where it goes.
        name: which set, see :data:`row_sets.SETS`.
        part: ``train`` or ``test``.
    """

    path: Path
    name: str
    part: str

    @property
    def set(self) -> PublicSet:
        """Where its rows come from."""
        return SETS[self.name]

    @property
    def title(self) -> str:
        """As progress bars call it."""
        return f"{self.name}.{self.part}"


@dataclass(frozen=True)
class Numbers:
    """How many rows, and which.

    Attributes:
        train: rows to learn from; ``None`` is the set's own number.
        test: most rows to test on; ``None`` is all there are.
        seed: which rows are drawn, and in which order they stand.
    """

    train: int | None = None
    test: int | None = None
    seed: int = 0

    def learn(self, chosen: PublicSet) -> int:
        """Rows to learn from."""
        return chosen.learn if self.train is None else self.train


def wanted_by(recipes: Iterable[Path], out: Path | None = None, *, both: bool = False) -> list[Wanted]:
    """The files that the recipes' tasks name, each once, in their order.

    Args:
        recipes: YAML files.
        out: put the files here instead of where the recipes look for them.
        both: also the other part of each set that is named.

    Raises:
        LoraweaveError: a recipe is wrong, names no files of rows, or one that is none of ours.
    """
    found: dict[Path, Wanted] = {}
    for recipe in recipes:
        named = list(_named(recipe))
        if not named:
            raise LoraweaveError(f"{recipe}: names no files of rows under data.tasks; there is nothing to make")
        for field, source in named:
            path = Path(os.path.normpath(source))
            match = _NAME.fullmatch(path.name)
            if match is None or match["name"] not in SETS:
                problem = unknown("set", match["name"] if match else path.name, SETS)
                raise LoraweaveError(
                    f"{recipe}: {field}: {problem}; files are called NAME.train.jsonl, NAME.test.jsonl"
                )
            for part in ("train", "test") if both else (match["part"],):
                place = (out or path.parent) / f"{match['name']}.{part}.jsonl"
                found.setdefault(place, Wanted(place, match["name"], part))
    return list(found.values())


def _named(recipe: Path) -> Iterator[tuple[str, str]]:
    for name, task in load_recipe(recipe).data.by_task().items():
        for part, source in (("train", task.train), ("test", task.test)):
            if source is not None and not source.startswith(ZOO_PREFIX):
                yield f"data.tasks.{name}.{part}", source


def chosen_rows(wanted: Wanted, items: Sequence[Item], numbers: Numbers) -> list[dict[str, Any]]:
    """The rows of a file, drawn from the items of its split, in a random order, so that the first few are fair.

    Incomplete items are left out. Where several answers are right, all that a split has for one input stand
    in one row. Where one split serves both parts, no tested input is among those learned from.

    Raises:
        LoraweaveError: no item is complete, or a split is too small to be cut in two.
    """
    chosen, complete = wanted.set, [item for item in items if item.complete]
    if not complete:
        where = f"{chosen.title}, {chosen.split(wanted.part)}"
        raise LoraweaveError(f"{where}: none of {len(items)} rows has a question and an answer; take another copy")
    rows = [(chosen.prompt.format(**item.fields), item.answers) for item in complete]
    if chosen.several:
        rows = list(_together(rows).items())
    _rng(wanted, numbers, "order").shuffle(rows)
    learn = numbers.learn(chosen)
    if chosen.cut:
        learned = dict(list(_together(rows).items())[:learn])
        if len(learned) == len(_together(rows)):
            raise LoraweaveError(
                f"{chosen.title}: {learn} rows to learn from leave none of {len(learned)} to test on; ask for fewer"
            )
        if wanted.part == "train":
            return [_row(text, answers[:1], None) for text, answers in learned.items()]
        rows = [row for row in rows if row[0] not in learned]
    rows = rows[: learn if wanted.part == "train" else numbers.test]
    return [_row(text, answers, chosen.several) for text, answers in rows]


def _together(rows: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Input -> all its right answers, in the order in which they come."""
    found: dict[str, dict[str, None]] = {}
    for text, answers in rows:
        found.setdefault(text, {}).update(dict.fromkeys(answers))
    return {text: tuple(answers) for text, answers in found.items()}


def _row(text: str, answers: tuple[str, ...], several: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"input": text, "target": answers[0]}
    return row | {several: list(answers)} if several and len(answers) > 1 else row


def _rng(wanted: Wanted, numbers: Numbers, purpose: str) -> random.Random:
    """Where one split serves both parts, both have to draw alike."""
    return random.Random(f"{purpose}|{wanted.name}|{wanted.set.split(wanted.part)}|{numbers.seed}")


def drawing(wanted: Wanted, numbers: Numbers) -> random.Random:
    """Which parts of a large split are read."""
    return _rng(wanted, numbers, "parts")


def wish(wanted: Wanted, numbers: Numbers) -> dict[str, Any]:
    """All that a file's rows hang on."""
    chosen = wanted.set
    asked: dict[str, Any] = {}
    if wanted.part == "train" or chosen.cut:
        asked["train_rows"] = numbers.learn(chosen)
    if wanted.part == "test":
        asked["test_rows"] = numbers.test
    return {
        "set": chosen.repo,
        "config": chosen.config,
        "split": chosen.split(wanted.part),
        "prompt": chosen.prompt,
        "seed": numbers.seed,
        **asked,
    }


def state(wanted: Wanted, numbers: Numbers) -> str:
    """``missing``, ``made``, or why the file there is not the one that is wanted."""
    if not wanted.path.exists():
        return "missing"
    entry = _recorded(wanted.path.parent).get(wanted.path.name)
    if entry is None:
        return "not made by this command"
    if entry.get("sha256") != _hash(wanted.path.read_bytes()):
        return "changed since it was made"
    for key, value in wish(wanted, numbers).items():
        if entry.get(key) != value:
            now = "another" if key == "prompt" else f"{entry.get(key)}, not {value}"
            return f"made with {key} {now}"
    return "made"


def write(wanted: Wanted, rows: Sequence[Mapping[str, Any]], numbers: Numbers, origin: str) -> None:
    """Write a file of rows, whole or not at all, and record how it was made. Raises as ``write_text_atomic``."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    entry = wish(wanted, numbers) | {
        "rows": len(rows),
        "licence": wanted.set.licence,
        "from": origin,
        "sha256": _hash(text.encode()),
    }
    # The record first: a file that is not in it would be taken for somebody else's.
    record = _recorded(wanted.path.parent) | {wanted.path.name: entry}
    write_json_atomic(wanted.path.parent / RECORD, dict(sorted(record.items())))
    write_text_atomic(wanted.path, text)


@contextmanager
def alone(folders: Iterable[Path]) -> Iterator[None]:
    """Nobody else writes rows to these folders meanwhile.

    Raises:
        LoraweaveError: somebody does, or a folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    locks = [FileLock(make_folder(folder) / ".rows.lock", timeout=0) for folder in sorted(set(folders))]
    try:
        for lock in locks:
            try:
                lock.acquire()
            except Timeout as error:
                where = str(Path(lock.lock_file).parent)
                raise LoraweaveError(f"another run writes rows to {where!r}; wait until it is done") from error
        yield
    finally:
        for lock in locks:
            lock.release()


def _recorded(folder: Path) -> dict[str, Any]:
    place = folder / RECORD
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LoraweaveError(f"cannot read {str(place)!r}: {error}; move it away, and make the rows anew") from error
    if not isinstance(record, dict):
        raise LoraweaveError(f"{place}: expected an object, got {type(record).__name__}; move it away")
    return record


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
