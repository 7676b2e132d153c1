"""What the documentation shows works: every ``python`` and ``console`` block of the README and of docs/ runs, offline.

Python blocks of one file share a namespace, as a reader would type them one after the other. Of console blocks the
lines ``$ loraweave ...`` run, in this process. Both run in one empty folder per file (with ``examples/`` and
``recipes/`` in it), in the order in which they stand. A block that cannot run here has ``<!-- skip: why -->`` on the
line above it; one that only prepares the next stands inside ``<!-- ... -->``, where readers do not see it. Other
languages are not run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraweave.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if path.exists()]
_FENCE = re.compile(
    r"^(?:<!--[ ]*skip:[ ]*(?P<skip>[^\n]*?)[ ]*-->\n)?^```(?P<language>python|console)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it starts, what it is in, and why it is skipped, if it is."""

    line: int
    language: str
    code: str
    skip: str | None


def blocks(text: str) -> list[Block]:
    """The ``python`` and ``console`` blocks of a Markdown text."""
    return [
        Block(text[: match.start("language")].count("\n") + 1, match["language"], match["code"], match["skip"])
        for match in _FENCE.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """The arguments of every ``$ loraweave ...`` line; a backslash at the end continues one."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if re.match(r"\$ loraweave\b", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    runnable = [block for block in found if block.skip is None]
    if not runnable:
        pytest.skip("no block to run: " + ("; ".join(f"{b.line}: {b.skip}" for b in found) or "it has none"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in runnable:
        if block.language == "python":
            # Blank lines in front, so that a traceback shows the page's own line.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        else:
            for arguments in commands(block.code):
                assert main(arguments) == 0, f"{page.name}:{block.line}: loraweave {shlex.join(arguments)}"


def test_blocks_are_found_with_their_lines_and_skips() -> None:
    text = (
        "a\n```python\nx = 1\n```\n<!-- skip: the hub -->\n```console\n$ loraweave version\n```\n```yaml\na: 1\n```\n"
    )
    assert blocks(text) == [
        Block(2, "python", "x = 1\n", None),
        Block(6, "console", "$ loraweave version\n", "the hub"),
    ]


def test_commands_are_the_loraweave_lines() -> None:
    code = "$ make setup\n$ loraweave train a.yaml \\\n    -o 'b c'  # comment\nsaved to b\n$ loraweave version\n"
    assert commands(code) == [["train", "a.yaml", "-o", "b c"], ["version"]]
