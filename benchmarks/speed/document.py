"""The tables of docs/performance.md: ``python benchmarks/speed/document.py RESULTS.json`` writes them anew.

A table stands between ``<!-- measured: SCENARIO -->`` and ``<!-- end -->``; the words around it are left alone. The
first line after ``<!-- source: FILE -->`` says where the figures come from.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from speed import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
_TABLE = re.compile(r"<!-- measured: (?P<name>[^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)
_SOURCE = re.compile(r"<!-- source: (?P<file>[^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)


def source(text: str) -> Path:
    """The results that a page names.

    Raises:
        ValueError: it names none.
    """
    match = _SOURCE.search(text)
    if match is None:
        raise ValueError("the page names no results; expected <!-- source: FILE --> ... <!-- end -->")
    return ROOT / match["file"]


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
        found = report.bound_rows(list(report.judge(results["scenarios"], results["memory"])))
    if found is None:
        return "*Not measured yet.*\n"
    what = results["scenarios"].get(name, {}).get("what")
    return (f"{name}: {what}\n\n" if what else "") + report.markdown_table(*found)


def written(text: str, results: dict[str, Any], file: str) -> str:
    """The page with every table and the line of its surroundings written anew from ``results``."""
    surroundings = "; ".join(f"{key} {value}" for key, value in results["environment"].items())

    def head(_: re.Match[str]) -> str:
        return f"<!-- source: {file} -->\nFrom `{file}`: {surroundings}.\n<!-- end -->"

    def block(match: re.Match[str]) -> str:
        return f"<!-- measured: {match['name']} -->\n{table(match['name'], results)}<!-- end -->"

    return _TABLE.sub(block, _SOURCE.sub(head, text))


def main(results: Path, page: Path = PAGE) -> None:
    file = results.resolve().relative_to(ROOT).as_posix()
    text = page.read_text(encoding="utf-8")
    page.write_text(written(text, json.loads(results.read_text()), file), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
