"""``loraweave report``: one HTML page about a comparison."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="what compare, demo or image wrote; or a folder of such folders")
    parser.add_argument("-o", "--out", metavar="FILE", help="where the page goes (default: RUN/report.html)")


def _run(options: argparse.Namespace) -> None:
    from loraweave.reporting.page import write_report

    print(write_report(options.folder, options.out))


VERB = Verb(
    name="report",
    summary="one HTML page about a comparison",
    details="Write one HTML page with the tables, the weights that gates give to each expert, their entropy during\n"
    "training, and the contact sheet of pictures. It needs no network and nothing beside it. Of a folder with several\n"
    "comparisons it also shows how retention changes with the number of experts.",
    examples=[
        ("loraweave report out/demo", "the page is out/demo/report.html"),
        ("loraweave report out -o out/all.html", "all comparisons in out/ on one page"),
    ],
    arguments=_arguments,
    run=_run,
)
