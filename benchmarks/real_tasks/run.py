"""Compares the ways to mix the bundled LoRAs of real tasks, on the real test sets.

    python benchmarks/real_tasks/run.py --data DATA -o out/real_tasks
    python benchmarks/real_tasks/run.py --data DATA -o out/real_tasks train.steps=100 train.seeds=[0]

``DATA`` holds the public sets (see README.md), each as ``NAME/train.jsonl`` and ``NAME/test.jsonl``. The comparison is
``loraweave compare`` on the recipe below; ``--commit NAME`` also writes ``results/NAME.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from loraweave.cli.comparing import compare
from loraweave.files import write_json_atomic, write_text_atomic
from loraweave.recipe import check_recipe
from loraweave.recipe.reading import override
from loraweave.reporting.tables import to_markdown

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "hotel": ("rnnlg/hotel", "bleu"),
    "restaurant": ("rnnlg/restaurant", "bleu"),
    "tv": ("rnnlg/tv", "bleu"),
    "e2e": ("e2e", "bleu"),
}


def recipe(data: Path) -> dict[str, Any]:
    """Every method with its defaults, beside MoLE's gates as the paper has them."""
    tasks = {
        name: {"train": str(data / place / "train.jsonl"), "test": str(data / place / "test.jsonl"), "metric": metric}
        for name, (place, metric) in TASKS.items()
    }
    return {
        "base": "zoo",
        "experts": {name: f"zoo:{name}" for name in TASKS},
        "compare": {
            "sum": {},
            "linear": {},
            "mole": {},
            "mole_paper": {
                "name": "mole",
                "evidence": "outputs",
                "normalization": "l2",
                "gate_form": "full",
                "balance": 0.5,
            },
        },
        "data": {"tasks": tasks, "train_items": 200, "test_items": 200},
        "train": {"seeds": [0, 1, 2, 3, 4]},
        "generation": {"max_new_tokens": 64, "batch_size": 64},
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data sets")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--commit", metavar="NAME", help="also keep the figures under results/")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe, e.g. train.steps=50")
    args = parser.parse_args()
    content = recipe(args.data.resolve())
    for assignment in args.overrides:
        override(content, assignment)
    results = compare(check_recipe(content, "real_tasks", Path.cwd()), args.out)
    if args.commit:
        kept = {key: value for key, value in results.items() if key != "recipe"}
        kept["settings"] = {key: content[key] for key in ("compare", "train", "generation")}
        kept["settings"] |= {key: content["data"][key] for key in ("train_items", "test_items")}
        write_json_atomic(RESULTS / f"{args.commit}.json", kept)
        write_text_atomic(RESULTS / f"{args.commit}.md", to_markdown(results))


if __name__ == "__main__":
    main()
