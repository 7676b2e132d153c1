"""One HTML page about what the commands left behind: nothing outside it is needed to read it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from loraweave.errors import LoraweaveError
from loraweave.files import write_text_atomic
from loraweave.reporting.parts.comparison import RESULTS, comparison
from loraweave.reporting.parts.curves import scaling
from loraweave.reporting.parts.judgement import JUDGEMENT, judgement
from loraweave.reporting.parts.painted import IMAGE, PICTURES, SCORES, SETTINGS, demo, image, testbed
from loraweave.reporting.parts.pictures import PICTURES as MOST_PICTURES

PAGE = "report.html"
_TEMPLATES = "templates"
# Of a contact sheet on a page with many: a row or two of each.
_LEAST_PICTURES = 12
_DIGITS = re.compile(r"(\d+)")


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about ``run``.

    Args:
        run: a folder that ``loraweave compare``, ``testbed``, ``judge``, ``image`` or ``demo`` wrote; or a folder of
            such folders, which adds curves over the number of experts where comparisons differ in it.
        out: default: ``report.html`` in ``run``.

    Returns:
        Where it was written.

    Raises:
        LoraweaveError: there is nothing to report, or a file is not what these commands write.
    """
    place = Path(run)
    target = place / PAGE if out is None else Path(out)
    write_text_atomic(target, render(place))
    return target


def render(run: Path) -> str:
    """The page itself. Raises as :func:`write_report`."""
    import jinja2

    if not run.is_dir():
        raise LoraweaveError(f"{str(run)!r}: no such folder; expected what 'loraweave compare' or 'testbed' wrote")
    folders = _folders(run)
    sheets = sum(any((folder / name).is_file() for name in (PICTURES, IMAGE)) for folder in folders)
    most = max(_LEAST_PICTURES, min(MOST_PICTURES, 3 * MOST_PICTURES // max(1, sheets)))
    runs: list[dict[str, Any]] = [
        {"name": "" if folder == run else folder.relative_to(run).as_posix(), "parts": parts}
        for folder in folders
        if (parts := _parts(folder, most))
    ]
    if not runs:
        raise LoraweaveError(
            f"{str(run)!r}: nothing to report; expected {RESULTS}, {PICTURES}, {SCORES}, {JUDGEMENT} or {IMAGE} in it "
            "or just below, as compare, testbed, judge, image and demo write them"
        )
    comparisons = [part for one in runs for part in one["parts"] if part["template"] == "comparison.html.j2"]
    folder = resources.files("loraweave.reporting") / _TEMPLATES
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template("page.html.j2")
    try:
        return page.render(title=run.resolve().name, runs=runs, scaling=scaling(comparisons))
    except (jinja2.UndefinedError, TypeError, ValueError, ArithmeticError) as error:
        raise LoraweaveError(f"{run}: holds what this version does not write ({error}); make it anew") from error


def _folders(run: Path) -> list[Path]:
    """The folder itself, those just below, and judgements of these, which lie one deeper."""
    children = _below(run)
    return [run, *(one for child in children for one in (child, *_below(child)) if one == child or _judged(one))]


def _below(folder: Path) -> list[Path]:
    """By name, n8 before n32."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(found, key=lambda path: [(len(n), n) if n.isdigit() else (0, n) for n in _DIGITS.split(path.name)])


def _judged(folder: Path) -> bool:
    return (folder / JUDGEMENT).is_file()


def _parts(folder: Path, most: int) -> list[dict[str, Any]]:
    """What the page shows of one folder; nothing if it holds nothing of ours."""
    parts: list[dict[str, Any]] = []

    def add(name: str, command: str, part: Callable[[Any], Mapping[str, Any]]) -> None:
        content = _json(folder / name)
        if content is not None:
            parts.append(_made(folder / name, command, lambda: part(content)))

    add(RESULTS, "compare", lambda found: demo(folder, found) if _is_demo(found) else comparison(folder, found, _json))
    if (folder / PICTURES).is_file() or (folder / SCORES).is_file():
        scores, settings = _json(folder / SCORES), _json(folder / SETTINGS)
        name = PICTURES if scores is None else SCORES
        parts.append(_made(folder / name, "testbed", lambda: testbed(folder, scores, settings, most)))
    add(IMAGE, "image", lambda found: image(folder, found, most))
    add(JUDGEMENT, "judge", judgement)
    return parts


def _is_demo(results: Any) -> bool:
    """``loraweave demo --images`` has results of its own kind."""
    return isinstance(results, Mapping) and "summary" in results and "retention" not in results


def _made(path: Path, command: str, part: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    try:
        return dict(part())
    except LoraweaveError as error:
        named = str(path.parent) in str(error)
        raise error if named else LoraweaveError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise LoraweaveError(
            f"{path}: not what {command!r} of this version writes ({type(error).__name__}: {error})"
        ) from error


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraweaveError(f"{path}: cannot be read ({error})") from error


def _breakable(name: str) -> Markup:
    """A name that may be broken at its joints, where a column is narrow."""
    return escape(name).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))
