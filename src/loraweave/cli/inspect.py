"""``loraweave inspect``: what LoRA folders and files hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraweave.cli.verb import Verb
from loraweave.errors import LoraweaveError

if TYPE_CHECKING:
    from loraweave.experts.report import ExpertReport


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+", help="PEFT folder, .safetensors file, hub id, or zoo:NAME")
    parser.add_argument("--json", action="store_true", help="print JSON: a list with one object per path")
    parser.add_argument("--offline", action="store_true", help="look in the hub cache, not on the hub")


def _run(options: argparse.Namespace) -> None:
    from loraweave.experts.inspection import inspect

    reports, problems = [], []
    for path in options.paths:
        try:
            report = inspect(_place(path), local_files_only=options.offline)
        except LoraweaveError as error:
            problems.append(str(error))
        else:
            report.source = path
            reports.append(report)
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    elif reports:
        _show(reports)
    if problems:
        raise LoraweaveError("\n".join(problems))


def _place(path: str) -> str:
    if not path.startswith("zoo:"):
        return path
    from loraweave import zoo

    name = path.removeprefix("zoo:")
    return str(zoo.experts([name])[name])


def _show(reports: Sequence[ExpertReport]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("LoRA", overflow="fold")
    for name in ("format", "rank", "alpha", "scale"):
        table.add_column(name, justify="right" if name != "format" else "left")
    table.add_column("targets", overflow="fold")
    for name in ("parameters", "MB"):
        table.add_column(name, justify="right")
    table.add_column("base", overflow="fold")
    table.add_column("mixable")
    for report in reports:
        kind = report.format if report.method in (None, "LORA") else f"{report.format} {report.method}"
        cells = [
            report.source,
            kind,
            _values(report.ranks),
            _values(report.alphas),
            _values(report.scales),
            ", ".join(f"{target} ×{count}" for target, count in report.targets.items()) or "-",
            f"{report.parameters:,}",
            f"{report.size / 1e6:.2f}",
            report.base or "-",
        ]
        verdict = Text("yes", style="green") if report.mixable else Text("no", style="bold red")
        table.add_row(*map(Text, cells), verdict)
    console.print(table)
    for report in reports:
        notes = ([f"cannot be mixed: {report.reason}"] if report.reason else []) + report.odd
        if notes:
            console.print(Text(report.source, style="bold"))
            for note in notes:
                console.print(Text(f"  - {note}"), soft_wrap=True)


def _values(counts: Mapping[Any, int]) -> str:
    """The values, commonest first; each LoRA has one as a rule."""
    listed = [f"{value:g}" for value in counts]
    return ", ".join(listed[:3]) + (" ..." if len(listed) > 3 else "") if listed else "-"


VERB = Verb(
    name="inspect",
    summary="what LoRA folders and files hold, and what is odd about them",
    details="What LoRA folders and files hold: rank, alpha, targets, base, size, whether a mixture can hold them,\n"
    "and what is odd about them. The base model is not needed.",
    examples=[
        ("loraweave inspect loras/qa loras/nli", "two PEFT folders side by side"),
        ("loraweave inspect someone/flan-nli-lora --json", "a LoRA from the hub, for a script"),
        ("loraweave inspect downloads/style.safetensors", "a single file, whoever wrote it"),
    ],
    arguments=_arguments,
    run=_run,
)
