"""The work of ``loraweave judge``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.answers import FOLDER, Answers
from loraweave.evaluation.judges.estimate import ANSWER_TOKENS, Estimate, estimate
from loraweave.evaluation.judges.judge import judge
from loraweave.evaluation.judges.pictures import pairs, read_pictures
from loraweave.evaluation.judges.question import DIMENSIONS, questions
from loraweave.evaluation.judges.server import MODEL, Access, Patience, Server
from loraweave.evaluation.judges.tally import tally
from loraweave.files import make_folder, write_json_atomic, write_text_atomic

RESULTS, SCORES = "judgement.json", "scores.jsonl"


def run(options: argparse.Namespace) -> None:
    """Estimate, ask, store, count, and print the table."""
    console = Console()
    compared = pairs(read_pictures(options.pictures), options.methods)
    asked = questions(compared)
    # A dry run needs no server; but whose answers are there already hangs on the model.
    access = None if options.dry_run else Access.from_environment(options.url, options.model)
    model = access.model if access else options.model or os.environ.get(MODEL, "")
    answers = Answers(options.out, model)
    if access is not None:
        for place in (Path(options.out), answers.folder):
            make_folder(place)  # tried before anything is paid for
    todo = answers.open(asked, again=options.retry_failed)
    cost = estimate(todo)
    for line in described(len(compared), len(asked), cost, options.price):
        console.print(line, highlight=False, soft_wrap=True)
    if access is None:
        if todo:
            console.print(f"\nthe first question:\n\n{todo[0].text}", markup=False, highlight=False, soft_wrap=True)
        return
    server = Server(access, Patience(timeout=options.timeout, tries=options.tries), options.temperature)
    try:
        judge(
            asked,
            server,
            answers,
            attempts=options.attempts,
            workers=options.workers,
            again=options.retry_failed,
            progress=sys.stderr.isatty(),
        )
    finally:
        counted = tally(asked, answers)
        if counted["answered"]:
            results = {**counted, "model": model, "url": access.url, "estimate": cost.to_dict()}
            scores = results.pop("scores")
            write_json_atomic(Path(options.out) / RESULTS, results)
            write_text_atomic(Path(options.out) / SCORES, "".join(json.dumps(row) + "\n" for row in scores))
    show(console, counted)
    written = [(RESULTS, "every number"), (SCORES, "a score per picture")] if counted["answered"] else []
    for name, what in (*written, (FOLDER, "every answer in full")):
        console.print(f"{Path(options.out) / name}: {what}", markup=False, highlight=False, soft_wrap=True)
    if counted["open"]:
        raise LoraweaveError(
            f"{counted['open']} of {len(asked)} questions are open, the server gave no answer; "
            "the same command asks them"
        )
    if not any(row["counted"] for row in counted["pairs"]):
        raise LoraweaveError(
            f"{counted['answered']} of {len(asked)} answers could be read and no pair in both orders, so there is "
            f"nothing to count; read in {answers.folder} what was said instead, take a model that keeps to the form, "
            "or ask again with --retry-failed"
        )


def described(n_pairs: int, n_questions: int, cost: Estimate, price: list[float] | None) -> list[str]:
    """What a run will do and cost, in words."""
    lines = [
        f"{n_pairs} pairs in both orders: {n_questions} questions, {n_questions - cost.calls} of them answered before",
        f"to ask: {cost.calls} calls with {cost.pictures} pictures, about {cost.tokens_in:,} tokens in and "
        f"{cost.tokens_out:,} out",
        f"(a token per 4 characters; 85 per picture and 170 per tile of 512 pixels; {ANSWER_TOKENS} per answer)",
    ]
    if price is not None:
        lines.append(f"price: about {cost.price(*price):.2f}, at {price[0]:g} and {price[1]:g} per million tokens")
    return lines


def show(console: Console, counted: dict[str, Any]) -> None:
    """The table of pairs, then position bias and what is missing."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("A against B", "dimension"):
        table.add_column(name)
    for name in ("A", "B", "A wins", "ties", "B wins", "pairs"):
        table.add_column(name, justify="right")
    for row in counted["pairs"]:
        for number, dimension in enumerate(DIMENSIONS):
            of, last = row[dimension], number == len(DIMENSIONS) - 1
            shares = [_text(of[key], percent=True) for key in ("wins", "ties", "losses")]
            name = "" if number else f"{row['a']} / {row['b']}"
            pairs_ = "" if number else str(row["counted"])
            table.add_row(Text(name), dimension, _text(of["a"]), _text(of["b"]), *shares, pairs_, end_section=last)
    console.print(table)
    for dimension, of in counted["position"].items():
        if of["bias"] is not None:
            flips = (
                "" if of["flips"] is None else f"; the two orders name opposite winners in {of['flips']:.0%} of pairs"
            )
            console.print(
                f"{dimension}: the picture shown first scores {of['bias']:+.2f} beside the second{flips}",
                highlight=False,
            )
    if counted["failed"]:
        console.print(f"{counted['failed']} answers could not be read or were refused; their pairs do not count")


def _text(value: float | None, percent: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if percent else f"{value:.2f}"
