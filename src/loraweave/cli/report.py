"""``loraweave report``: one HTML page about what other commands left behind."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN", help="what compare, demo, testbed, judge or image wrote; or a folder of these"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="where the page goes (default: RUN/report.html)")


def _run(options: argparse.Namespace) -> None:
    from loraweave.reporting.page import write_report

    print(write_report(options.folder, options.out))


VERB = Verb(
    name="report",
    summary="one HTML page about a comparison, a test bed or a judgement",
    details="Write one HTML page. Of a comparison: the tables, published figures beside ours, what each method's\n"
    "gates give to each expert, and their training. Of a test bed: contact sheets and scores. Of a judgement: wins\n"
    "and position bias. It needs no network and nothing beside it. Of a folder with several comparisons it also shows\n"
    "how retention changes with the number of experts.",
    examples=[
        ("loraweave report out/demo", "the page is out/demo/report.html"),
        ("loraweave report out/anime", "a test bed with its judgement, if that is in out/anime/judged"),
        ("loraweave report out -o out/all.html", "all comparisons in out/ on one page"),
    ],
    arguments=_arguments,
    run=_run,
)
