"""``loraweave agree``: how columns of scores agree, for example a judge's with people's."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help=".csv with a header, or .jsonl")
    parser.add_argument("reference", metavar="REFERENCE", help="the column to compare with, e.g. what people said")
    parser.add_argument("columns", metavar="COLUMN", nargs="*", help="those to compare (default: all other numbers)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> None:
    import json

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from loraweave.evaluation.agreement import agreement, read_table

    named = [options.reference, *options.columns] if options.columns else []
    found = agreement(read_table(options.table, named), options.reference, options.columns)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(Text(f"with {options.reference}"))
    for name in ("Pearson", "Spearman", "Kendall", "rows"):
        table.add_column(name, justify="right")
    for name, of in found.items():
        values = (of[key] for key in ("pearson", "spearman", "kendall"))
        # All of the column is equal.
        shown = ("undefined" if value is None else f"{value:.3f}" for value in values)
        table.add_row(Text(name), *shown, str(of["n"]))
    Console().print(table)


VERB = Verb(
    name="agree",
    summary="how columns of scores agree, e.g. a judge's with people's",
    details="Pearson's, Spearman's and Kendall's (tau-b) coefficients between one column of a table and others.",
    examples=[
        ("loraweave agree scores.csv people", "every other column of numbers with 'people'"),
        ("loraweave agree scores.jsonl people judge clip", "two of them"),
    ],
    arguments=_arguments,
    run=_run,
)
