"""The tables of docs/performance.md: ``python benchmarks/speed/document.py RESULTS.json [OLDER.json]`` writes them.

A table stands between ``<!-- measured: SCENARIO -->`` and ``<!-- end -->``; the words around it are left alone. What
follows ``<!-- source: FILE [OLDER ...] -->`` says where the figures come from; a scenario that one file lacks is
taken from the next.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from speed import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
_TABLE = re.compile(r"<!-- measured: (?P<name>[^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)
_SOURCE = re.compile(r"<!-- source: (?P<file>[^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)


def sources(text: str) -> list[Path]:
    """The results that a page names, the newest first.

    Raises:
        ValueError: it names none.
    """
    match = _SOURCE.search(text)
    if match is None:
        raise ValueError("the page names no results; expected <!-- source: FILE --> ... <!-- end -->")
    return [ROOT / file for file in match["file"].split()]


def table(name: str, results: dict[str, Any]) -> str:
    """One table in Markdown: a scenario, ``memory``, ``arithmetic`` or ``required``; says so where it is not there."""
    found: tuple[list[str], report.Rows] | None = None
    if name in results["scenarios"]:
        found = report.time_rows(results["scenarios"][name])
    elif name == "memory" and results["memory"]:
        found = report.memory_rows(results["memory"])
    elif name == "arithmetic" and any(row.get("arithmetic") for row in results["scenarios"].values()):
        found = report.arithmetic_rows(results["scenarios"])
    elif name == "required":
        bounds = report.bounds_of(results["size"])
        found = report.bound_rows(list(report.judge(results["scenarios"], results["memory"], bounds)))
    if found is None:
        return "*Not measured yet.*\n"
    what = results["scenarios"].get(name, {}).get("what")
    return (f"{name}: {what}\n\n" if what else "") + report.markdown_table(*found)


def written(text: str, found: Mapping[str, dict[str, Any]]) -> str:
    """The page with every table and the lines of its surroundings written anew from results by file, newest first."""
    parts: dict[str, Any] = {"scenarios": {}, "memory": {}}
    sizes = {one.get("size", {}).get("name", "full") for one in found.values()}
    if len(sizes) > 1:
        raise ValueError(f"the results are of several sizes: {', '.join(sorted(sizes))}; a page shows one")
    lines = []
    for file, one in found.items():
        surroundings = "; ".join(f"{key} {value}" for key, value in one["environment"].items())
        new = [name for name in one["scenarios"] if name not in parts["scenarios"]]
        what = f"Older, from `{file}`: {'; '.join(new)}" if lines else f"From `{file}`"
        lines.append(f"{what}: {surroundings}.")
        for part, known in parts.items():
            parts[part] = {**one[part], **known}
    results = parts | {"size": sizes.pop()}

    def head(_: re.Match[str]) -> str:
        return f"<!-- source: {' '.join(found)} -->\n" + "\n\n".join(lines) + "\n<!-- end -->"

    def block(match: re.Match[str]) -> str:
        return f"<!-- measured: {match['name']} -->\n{table(match['name'], results)}<!-- end -->"

    return _TABLE.sub(block, _SOURCE.sub(head, text))


def read(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results by the name that the page has for their file."""
    return {file.resolve().relative_to(ROOT).as_posix(): json.loads(file.read_text()) for file in files}


def main(files: Sequence[Path], page: Path = PAGE) -> None:
    page.write_text(written(page.read_text(encoding="utf-8"), read(files)), encoding="utf-8")


if __name__ == "__main__":
    main([Path(file) for file in sys.argv[1:]])
