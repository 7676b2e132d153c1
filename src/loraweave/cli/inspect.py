"""``loraweave inspect``: what LoRA folders and files hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    from loraweave import zoo
    from loraweave.experts.inspection import inspect

    reports, problems = [], []
    for path in options.paths:
        try:
            report = inspect(zoo.local(path), local_files_only=options.offline)
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


def _show(reports: Sequence[ExpertReport]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("LoRA", "format", "rank", "alpha", "scale", "targets", "params", "MB", "base", "mixable"):
        numeric = name in ("rank", "alpha", "scale", "params", "MB")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for name, report in zip(_names(reports), reports, strict=True):
        kind = report.format if report.method in (None, "LORA") else f"{report.format} {report.method}"
        cells = [
            name,
            kind,
            _values(report.ranks),
            _values(report.alphas),
            _values(report.scales),
            " ".join(report.targets) or "-",
            _thousands(report.parameters),
            f"{report.size / 1e6:.1f}",
            Path(report.base).name if report.base and Path(report.base).is_absolute() else report.base or "-",
        ]
        verdict = Text("yes", style="green") if report.mixable else Text("no", style="bold red")
        table.add_row(*map(Text, cells), verdict)
    console.print(table)
    for report in reports:
        notes = ([f"cannot be mixed: {report.reason}"] if report.reason else []) + report.odd
        if report.architecture:
            notes.append(f"looks made for {report.architecture}")
        if report.text_encoder_share:
            notes.append(f"{report.text_encoder_share:.0%} of it extends text encoders")
        if report.triggers:
            notes.append(f"called up by: {', '.join(report.triggers)}")
        if notes:
            console.print(Text(report.source, style="bold"))
            for note in notes:
                console.print(Text(f"  - {note}"), soft_wrap=True)


def _names(reports: Sequence[ExpertReport]) -> list[str]:
    """The last parts of the sources where those tell them apart: paths in full would squeeze the rest."""
    last = [report.source.rstrip("/").rpartition("/")[2] for report in reports]
    return last if len(set(last)) == len(last) else [report.source for report in reports]


def _thousands(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


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
