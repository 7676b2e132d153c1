"""The command line: finds the verb, runs it, and says in one line what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from loraweave import __version__
from loraweave.cli import (
    agree,
    compare,
    demo,
    evaluate,
    fuse,
    generate,
    image,
    inspect,
    judge,
    merge,
    plot,
    report,
    testbed,
    train,
    validate,
    version,
)
from loraweave.cli.processes import part
from loraweave.cli.verb import Parser, Verb, paragraphs
from loraweave.errors import LoraweaveError, LoraweaveWarning, unknown

VERBS: dict[str, Verb] = {
    module.VERB.name: module.VERB
    for module in (
        demo,
        inspect,
        merge,
        fuse,
        train,
        generate,
        evaluate,
        compare,
        report,
        image,
        testbed,
        judge,
        agree,
        validate,
        plot,
        version,
    )
}

_RECIPE = """\
a recipe:
  base: google/flan-t5-base
  experts: {qa: loras/qa, nli: someone/flan-nli-lora}
  method: {name: mole, granularity: block}
  data: {train: train.jsonl, test: test.jsonl, metric: exact_match}
  train: {steps: 200, seed: 0}

Paths are relative to the recipe. 'zoo' is the bundled base, 'zoo:NAME' a bundled expert or generated task.
Any field can be set on the command line: loraweave train recipe.yaml -o out/mixture train.steps=50 method.scale=2"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``loraweave``; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when transformers is first imported; its advice is for programmers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options = parse(arguments)
            options.run(options)
        except LoraweaveError as error:
            if "--debug" in arguments:
                raise
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Whoever read our output has seen enough; without this, Python complains when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            part()
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    first = "\n".join(f"  {verb.examples[0][0]}" for verb in VERBS.values())
    whole = Parser(
        prog="loraweave",
        usage="loraweave VERB ...   (loraweave VERB --help says more)",
        description="Compose trained LoRAs into one model that keeps what each could do.",
        epilog=f"verbs:\n{listed}\n\nexamples:\n{first}\n\n{_RECIPE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"loraweave {__version__}")
    verbs = whole.add_subparsers(prog="loraweave", metavar="VERB", help=argparse.SUPPRESS)
    for verb in VERBS.values():
        one = verbs.add_parser(
            verb.name,
            description=verb.details,
            epilog=paragraphs(verb.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.arguments(one)
        one.add_argument("--debug", action="store_true", help="on an error, show where in the code it arose")
        one.set_defaults(run=verb.run)
    return whole


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    if not arguments:
        arguments = ["--help"]
    if not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise unknown("verb", arguments[0], VERBS)
    options, rest = parser().parse_known_args(arguments)
    if hasattr(options, "loras"):
        # Where an option is between METHOD and LORA, argparse leaves these over.
        options.loras = [*options.loras, *(argument for argument in rest if not argument.startswith("-"))]
        rest = [argument for argument in rest if argument.startswith("-")]
    # argparse gives FIELD=VALUE to the verb if it follows RECIPE at once, and leaves it over if an option is between.
    stray = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if stray or (rest and not hasattr(options, "overrides")):
        wrong = (stray or rest)[0]
        raise LoraweaveError(f"argument {wrong!r} is one too many; see loraweave {arguments[0]} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    # Others' warnings are about code, which nobody at a command line can change.
    if issubclass(category, LoraweaveWarning):
        print(f"warning: {message}", file=sys.stderr)
