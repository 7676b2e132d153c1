"""``loraweave evaluate``: how good a mixture's answers are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from loraweave.cli.verb import Verb, add_generation, add_masks, positive
from loraweave.errors import LoraweaveError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="folder or hub id of a saved mixture, or a recipe (.yaml)")
    parser.add_argument(
        "--data", metavar="FILE", help="test data: .jsonl, zoo:FAMILY/VARIANT, or a recipe, whose tests are taken"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="exact_match, accuracy, bleu, rougeL ... (default: exact_match)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="most items per task")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the JSON there, with every answer")
    add_masks(parser)
    add_generation(parser)


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli import building
    from loraweave.evaluation.environment import environment, peak_memory_gb
    from loraweave.evaluation.metrics import get_metric
    from loraweave.evaluation.scoring import score
    from loraweave.files import write_json_atomic
    from loraweave.training.learn import learns

    if options.metric:
        get_metric(options.metric)
    recipe = building.recipe_of(options.mixture)
    tests = building.held_out(recipe, options.data, options.metric, options.limit)
    opened = building.open_mixture(options.mixture, recipe)
    if recipe is not None and learns(opened.mixture):
        print("note: a recipe's mixture has learned nothing yet; train it and evaluate the folder", file=sys.stderr)
    settings = building.generation(recipe, options)
    rows: dict[str, dict[str, Any]] = {}
    with building.masked(opened.mixture, options):
        for name, test in tests.items():
            got = score(
                opened.mixture.model, opened.tokenizer, test.examples, test.metric, description=name, **settings
            )
            rows[name] = {"metric": got.metric, "score": got.value, "n": got.n, "seconds": got.seconds}
            if options.out:
                rows[name]["answers"] = [
                    {"input": example.input, "output": answer, "references": example.references, "score": value}
                    for example, answer, value in zip(test.examples, got.predictions, got.per_item, strict=True)
                ]
    policy = opened.mixture.policy
    result = {
        "mixture": options.mixture,
        "method": policy.name,
        "experts": opened.mixture.experts,
        "only": options.only,
        "without": options.without,
        "generation": settings,
        "tasks": rows,
        "peak_memory_gb": peak_memory_gb(),
        **environment(),
    }
    if options.out:
        write_json_atomic(options.out, result)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _show(rows)


def _show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        raise LoraweaveError("nothing was evaluated")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "metric", "score", "items", "seconds"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for name, row in rows.items():
        table.add_row(Text(name), row["metric"], f"{row['score']:.1f}", str(row["n"]), f"{row['seconds']:.1f}")
    if len(rows) > 1:
        table.add_section()
        mean = sum(row["score"] for row in rows.values()) / len(rows)
        table.add_row("mean", "", f"{mean:.1f}", str(sum(row["n"] for row in rows.values())), "")
    Console().print(table)


VERB = Verb(
    name="evaluate",
    summary="score a mixture's answers on test data",
    details="Score a mixture's answers on test data. Scores are percentages; higher is better.",
    examples=[
        ("loraweave evaluate out/mixture --data test.jsonl --metric rougeL", "one file"),
        ("loraweave evaluate out/mixture --data examples/zoo.yaml -o scores.json", "all tests of a recipe"),
        ("loraweave evaluate out/mixture --data test.jsonl --without nli", "what does one expert contribute?"),
    ],
    arguments=_arguments,
    run=_run,
)
