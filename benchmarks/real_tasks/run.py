"""Compare the methods on the bundled LoRAs of real tasks.

    python benchmarks/real_tasks/run.py --data ../shared/data

The data are not part of this repository (see README.md beside this file); the scores are. What it writes is what
``loraweave compare`` writes: results.json, a picture of the learned weights, and the mixture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loraweave import zoo
from loraweave.cli.comparing import compare
from loraweave.files import write_json_atomic, write_text_atomic
from loraweave.recipe import check_recipe
from loraweave.reporting.tables import to_markdown

HERE = Path(__file__).parent
TEST_FILE = "test.jsonl"


def content(data: Path, items: int, seeds: int) -> dict[str, object]:
    """The recipe: every bundled LoRA of a real task, each on its own test file."""
    real = {name: skill for name, skill in zoo.skills().items() if skill["data"].startswith("data:")}
    tasks = {
        name: {
            "train": str((data / skill["data"].removeprefix("data:") / "train.jsonl").resolve()),
            "test": str((data / skill["data"].removeprefix("data:") / TEST_FILE).resolve()),
            "metric": skill["metric"],
        }
        for name, skill in real.items()
    }
    return {
        "base": "zoo",
        "experts": {name: f"zoo:{name}" for name in real},
        "compare": {
            "sum": {},
            "linear": {},
            "mole": {},
            "mole_paper": {"name": "mole", "scale": 1.0, "gate_form": "full", "train": {"learning_rate": 1e-5}},
        },
        "data": {"tasks": tasks, "train_items": 200, "test_items": items},
        "train": {"seeds": list(range(seeds)), "steps": 100, "max_input_length": 96, "max_target_length": 64},
        "generation": {"max_new_tokens": 48, "batch_size": 64},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--items", type=int, default=100, help="test items per task")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/real_tasks"))
    args = parser.parse_args()
    recipe = check_recipe(content(args.data, args.items, args.seeds), "benchmarks/real_tasks", HERE)
    results = compare(recipe, args.out)
    # Files of one machine do not belong into a committed result.
    results.pop("recipe", None)
    write_json_atomic(HERE / "results.json", results)
    write_text_atomic(HERE / "results.md", to_markdown(results) + "\n")


if __name__ == "__main__":
    main()
