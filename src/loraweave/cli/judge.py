"""``loraweave judge``: a vision-language model compares pictures in pairs."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb, finite, positive


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", metavar="PICTURES", help=".jsonl, rows with 'id', 'elements' and 'pictures'")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where answers and results go, and come from")
    parser.add_argument("--methods", metavar="NAME", nargs="+", default=[], help="compare these alone (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost and ask, and ask nothing")
    parser.add_argument("--url", metavar="URL", help="of the server, up to /v1 (default: $LORAWEAVE_JUDGE_URL)")
    parser.add_argument("--model", metavar="NAME", help="who judges (default: $LORAWEAVE_JUDGE_MODEL)")
    parser.add_argument("--workers", type=positive, metavar="N", default=1, help="questions at once (default: 1)")
    parser.add_argument("--timeout", type=_above_zero, metavar="S", default=120.0, help="seconds (default: 120)")
    parser.add_argument(
        "--tries", type=positive, metavar="N", default=6, help="requests per answer while the server fails (default: 6)"
    )
    parser.add_argument(
        "--attempts", type=positive, metavar="N", default=3, help="answers per question until one is clear (default: 3)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="ask again what failed in an earlier run")
    parser.add_argument(
        "--temperature", metavar="X", type=_temperature, default=0.0, help="or 'none' to send none (default: 0)"
    )
    parser.add_argument(
        "--price",
        metavar=("IN", "OUT"),
        type=_not_below_zero,
        nargs=2,
        help="of a million tokens, for an estimate in money",
    )


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli.judging import run

    run(options)


def _above_zero(text: str) -> float:
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _not_below_zero(text: str) -> float:
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def _temperature(text: str) -> float | None:
    return None if text == "none" else _not_below_zero(text)


VERB = Verb(
    name="judge",
    summary="a vision-language model compares pictures in pairs",
    details="Let a vision-language model score pictures in pairs: composition and quality, 0 to 10, in both orders.\n"
    "Works with every server that speaks OpenAI's chat protocol; its address, model and key come from\n"
    "LORAWEAVE_JUDGE_URL, LORAWEAVE_JUDGE_MODEL and LORAWEAVE_JUDGE_KEY, or from OPENAI_BASE_URL and OPENAI_API_KEY.\n"
    "Every answer is stored at once: the same command goes on where it stopped, and asks nothing twice.\n"
    "Leaves judgement.json (wins, means, position bias) and scores.jsonl, a table for loraweave agree.",
    examples=[
        ("loraweave judge out/pictures.jsonl -o out/judged --dry-run", "what it would ask, and what that would cost"),
        (
            "loraweave judge out/pictures.jsonl -o out/judged --url http://localhost:8000/v1 --model qwen2.5-vl",
            "a model on this machine",
        ),
    ],
    arguments=_arguments,
    run=_run,
)
