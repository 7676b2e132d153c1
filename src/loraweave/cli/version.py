"""``loraweave version``."""

from __future__ import annotations

import argparse
import json

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> None:
    from loraweave.evaluation.environment import environment

    found = environment()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, number in found["versions"].items():
        print(f"{name:<13} {number or 'not installed'}")


VERB = Verb(
    name="version",
    summary="versions of loraweave and of what it stands on, for bug reports",
    details="Versions of loraweave and of what it stands on, and the machine, for bug reports.",
    examples=[("loraweave version --json", "what to paste into a bug report")],
    arguments=_arguments,
    run=_run,
)
