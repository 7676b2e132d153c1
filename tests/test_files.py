"""Nothing half-written, nothing foreign replaced."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from loraweave.errors import LoraweaveError
from loraweave.files import (
    atomic_path,
    check_replaceable,
    make_folder,
    replace_folder_atomic,
    write_json_atomic,
    write_text_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_is_written_as_utf8_with_parents(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "new" / "deep" / "note.txt", "Grüße\n")
    assert (tmp_path / "new/deep/note.txt").read_bytes() == "Grüße\n".encode()
    assert names(tmp_path / "new/deep") == ["note.txt"]


def test_json_round_trip_with_paths(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"z": [1, 2.5, None], "a": Path("x") / "y", "ü": "ß"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": [1, 2.5, None], "a": os.path.join("x", "y"), "ü": "ß"}
    assert text.index('"z"') < text.index('"a"')
    assert "ü" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(("bad", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ({1}, TypeError)])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path, bad: object, error: type[Exception]) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(error):
        write_json_atomic(path, {"new": 2, "bad": bad})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".bin"
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_modes_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text_atomic(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "ours").chmod(0o640)
    write_text_atomic(tmp_path / "ours", "again")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(LoraweaveError, match="folder has that name"):
        write_text_atomic(tmp_path / "folder", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraweaveError, match=r"cannot write .*file/a\.txt"):
        write_text_atomic(tmp_path / "file" / "a.txt", "x")


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "mix"
    with replace_folder_atomic(target) as folder:
        fill(folder, a="1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target) == ["a"]
    assert names(target.parent) == ["mix"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def test_folder_of_ours_is_replaced_without_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "mix"
    for text, extra in (("1", "stale-1"), ("2", "other")):
        with replace_folder_atomic(target, ours=("mixture.json", "stale-*")) as folder:
            fill(folder, **{"mixture.json": text, extra: ""})
    assert names(target) == ["mixture.json", "other"]
    assert (target / "mixture.json").read_text() == "2"
    assert names(tmp_path) == ["mix"]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "mix").mkdir()
    with replace_folder_atomic(tmp_path / "mix") as folder:
        fill(folder, a="1")
    assert names(tmp_path / "mix") == ["a"]


def test_foreign_content_is_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    fill(target, **{"mixture.json": "1", "chapter.tex": "years"})
    started = False

    def replace(**options: bool) -> None:
        nonlocal started
        with replace_folder_atomic(target, ours=("mixture.json",), **options) as folder:
            started = True
            fill(folder, a="1")

    with pytest.raises(LoraweaveError, match=r"chapter\.tex"):
        check_replaceable(target, ours=("mixture.json",))
    check_replaceable(target, ours=("mixture.json", "*.tex"))
    with pytest.raises(LoraweaveError, match=r"chapter\.tex"):
        replace()
    assert not started
    assert names(target) == ["chapter.tex", "mixture.json"]
    assert names(tmp_path) == ["thesis"]
    replace(force=True)
    assert names(target) == ["a"]


def test_what_turns_up_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "mix"

    def replace() -> None:
        with replace_folder_atomic(target, ours=("a",)) as folder:
            fill(folder, a="1")
            target.mkdir()
            fill(target, thesis="years")

    with pytest.raises(LoraweaveError, match="thesis"):
        replace()
    assert names(target) == ["thesis"]
    assert names(tmp_path) == ["mix"]


def test_an_exception_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "mix"
    target.mkdir()
    fill(target, a="old")

    def interrupted() -> None:
        with replace_folder_atomic(target, ours=("a",)) as folder:
            fill(folder, a="half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["mix"]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "mix"
    target.mkdir()
    fill(target, a="old")
    rename = Path.rename

    def fails_for_new(self: Path, other: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, other)

    def replace() -> None:
        with replace_folder_atomic(target, ours=("a",)) as folder:
            fill(folder, a="new")

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(LoraweaveError, match="No space left"):
        replace()
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["mix"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "mix").write_text("x")

    def replace() -> None:
        with replace_folder_atomic(tmp_path / "mix", force=True):
            pass

    with pytest.raises(LoraweaveError, match="a file has that name"):
        replace()
    assert (tmp_path / "mix").read_text() == "x"


@pytest.mark.parametrize("place", ["file/out", "file/deep/out"])
def test_a_place_that_cannot_be_written_shows_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraweaveError, match=r"cannot write '.*out'"):
        check_replaceable(tmp_path / place)
    with pytest.raises(LoraweaveError, match=r"cannot write '.*out'"):
        make_folder(tmp_path / place)
    check_replaceable(tmp_path / "new" / "deep")
    assert names(tmp_path) == ["file"]
    assert make_folder(tmp_path / "new" / "deep").is_dir()
    assert names(tmp_path / "new" / "deep") == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has such a place, others may not")
def test_a_folder_is_tried_not_asked() -> None:
    """Root may write anywhere, says the system, and yet not here."""
    with pytest.raises(LoraweaveError, match="cannot write '/proc/self'"):
        make_folder("/proc/self")
