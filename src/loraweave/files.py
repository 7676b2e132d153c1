"""Writing files so that nobody ever finds half of one: a temporary sibling first, then a rename."""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraweave.errors import LoraweaveError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it becomes ``path`` when the block ends well.

    The temporary name keeps the suffix, so that writers which choose a format by it work. Missing parent folders are
    made. A link is followed: what it points to is replaced. On an exception the temporary file goes and ``path``
    stays as it was.

    Raises:
        LoraweaveError: ``path`` is a folder, or the place cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise LoraweaveError(f"cannot write {os.fspath(path)!r}: expected a file name, but a folder has that name")
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    with _explained(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    try:
        if target.exists():
            shutil.copymode(target, temporary)
        yield temporary
        with _explained(path):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, all of it or nothing. Raises as :func:`atomic_path` does."""
    with atomic_path(path) as temporary, _explained(path):
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON to ``path``, all of it or nothing. Paths become text.

    Raises:
        LoraweaveError: as :func:`atomic_path`.
        ValueError: a number is NaN or infinite, which JSON cannot hold.
        TypeError: something in ``obj`` has no JSON form.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    write_text_atomic(path, text + "\n")


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder unless it is there, to learn before hours of work that what comes of it can be kept.

    Raises:
        LoraweaveError: it cannot be made, is a file, or cannot be written to.
    """
    made = Path(folder)
    with _explained(folder):
        made.mkdir(parents=True, exist_ok=True)
        # Written, not asked: root has every permission, and a disk may be full or mounted for reading only.
        with tempfile.TemporaryFile(dir=made) as file:
            file.write(b"0")
    return made


@contextmanager
def replace_folder_atomic(
    folder: str | os.PathLike[str], *, ours: Sequence[str] = (), force: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``folder`` to fill; it becomes ``folder`` when the block ends well.

    A folder that is already there is replaced as a whole, so nothing stale stays behind, but only if it holds nothing
    except what we write ourselves. On an exception the temporary folder goes and ``folder`` stays as it was.

    Args:
        folder: where to write; missing parents are made, and a link is followed.
        ours: names or patterns (``"checkpoint-*"``) of the top-level entries that may be replaced.
        force: replace the folder whatever it holds.

    Raises:
        LoraweaveError: ``folder`` is a file or holds something that is not ours, or cannot be written to.
    """
    target = Path(os.path.realpath(folder))
    check_replaceable(folder, ours=ours, force=force)
    mark = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{mark}.new")
    with _explained(folder):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        # Again, because filling the folder may have taken hours.
        check_replaceable(folder, ours=ours, force=force)
        with _explained(folder):
            _swap(temporary, target, target.with_name(f".{target.name}.{mark}.old"))
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _swap(new: Path, target: Path, aside: Path) -> None:
    """Rename ``new`` to ``target``; what was there goes, or comes back if the rename fails."""
    if not target.exists():
        new.rename(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def check_replaceable(folder: str | os.PathLike[str], *, ours: Sequence[str] = (), force: bool = False) -> None:
    """Raise now what :func:`replace_folder_atomic` would raise later, after work that took hours.

    Raises:
        LoraweaveError: ``folder`` is a file or holds something that is not ours, or nothing can be written there.
    """
    target, shown = Path(os.path.realpath(folder)), os.fspath(folder)
    if target.exists() and not target.is_dir():
        raise LoraweaveError(f"cannot write the folder {shown!r}: a file has that name; choose another name")
    above = next(place for place in target.parents if place.exists())
    with _explained(shown), tempfile.TemporaryDirectory(prefix=".", dir=above):
        pass
    if force or not target.exists():
        return
    with _explained(shown):
        entries = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in entries if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ours)]
    if foreign:
        raise LoraweaveError(
            f"will not replace the folder {shown!r}: it holds {foreign[0]!r}, which loraweave did not write; "
            "choose another folder or move that away"
        )


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which path could not be written instead of naming our temporary one."""
    try:
        yield
    except OSError as error:
        raise LoraweaveError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")
