"""``loraweave generate``: answers of a mixture."""

from __future__ import annotations

import argparse
import json
import sys

from loraweave.cli.verb import Verb, add_generation, add_masks


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="folder or hub id of a saved mixture, or a recipe (.yaml)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="TEXT", nargs="+", help="what to answer")
    source.add_argument(
        "--file", metavar="FILE", help=".jsonl with 'input' in each row, or plain text, one input a line"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with 'input' and 'output' a line")
    add_masks(parser)
    add_generation(parser)


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli import building
    from loraweave.evaluation.scoring import predict

    inputs = options.input or building.read_inputs(options.file)
    opened = building.open_mixture(options.mixture)
    with building.masked(opened.mixture, options):
        answers = predict(
            opened.mixture.model,
            opened.tokenizer,
            inputs,
            progress=len(inputs) > 1 and sys.stderr.isatty(),
            **building.generation(opened.recipe, options),
        )
    for text, answer in zip(inputs, answers, strict=True):
        print(json.dumps({"input": text, "output": answer}, ensure_ascii=False) if options.json else answer)


VERB = Verb(
    name="generate",
    summary="let a mixture answer",
    details="Let a mixture answer: texts from the command line, a file, or standard input (one a line).\n"
    "One answer a line (--json keeps answers apart that have several). Experts can be masked without retraining.",
    examples=[
        ("loraweave generate out/mixture --input 'sort: pear fig apple'", "one answer"),
        ("loraweave generate out/mixture --file questions.jsonl --json > answers.jsonl", "a file of them"),
        ("loraweave generate out/mixture --input 'sort: pear fig' --only sort", "from one expert alone"),
    ],
    arguments=_arguments,
    run=_run,
)
