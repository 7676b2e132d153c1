"""What a verb of the command line is. One file a verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from loraweave.errors import LoraweaveError


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: what the user types.
        summary: half a line for the list of verbs.
        details: what its own help page says first.
        examples: command lines that work as they stand, each with what it does.
        arguments: adds the verb's arguments to its parser.
        run: does it; raises :class:`LoraweaveError` for whatever the user can mend.
    """

    name: str
    summary: str
    details: str
    examples: Sequence[tuple[str, str]]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        raise LoraweaveError(f"{message}; see {self.prog} --help")


def paragraphs(examples: Sequence[tuple[str, str]]) -> str:
    """Examples as help pages show them: what it does, then the command."""
    return "examples:\n" + "\n".join(f"  # {what}\n  {command}" for command, what in examples)


def positive(text: str) -> int:
    """An argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def finite(text: str) -> float:
    """An argument that is a number, neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return number


def add_masks(parser: argparse.ArgumentParser) -> None:
    """``--only`` and ``--without``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--only", metavar="NAME", nargs="+", default=[], help="use these experts and mask the others")
    group.add_argument("--without", metavar="NAME", nargs="+", default=[], help="mask these experts")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How answers are generated; what is not given comes from the recipe, or from its defaults."""
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--num-beams", type=positive, metavar="N", help="1 is greedy (default: 1)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="inputs at once (default: 32)")
