"""How much of each of the bundled skills every method keeps, when all of them are mixed.

python benchmarks/quality/retention.py --data DATA -o out/quality/retention
python benchmarks/quality/retention.py --data DATA -o out/quality/retention train.seeds=[0] data.test_items=10
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from loraweave import zoo
from loraweave.zoo import tasks
from quality import common

METHODS: dict[str, dict[str, Any]] = {
    "sum": {},
    "nla": {"name": "linear"},
    "lorahub": {},
    "lorahub_per_task": common.LORAHUB_PER_TASK,
    "pem": common.merged("concat"),
    "ties": common.merged("ties"),
    "dare_ties": common.merged("dare_ties"),
    "knots": common.merged("knots"),
    "cat": {},
    "arrow": {},
    "logo": {},
    "lora_flow": {},
    "mole": {},
    "mole_paper": common.PAPER,
    "best_single": {},
}


def recipe(data: Path, scratch: Path, split: common.Split, skills: Sequence[str] | None = None) -> dict[str, Any]:
    """All bundled LoRAs, or some, each with the task it was made for.

    Args:
        data: folder of the real sets.
        scratch: where the generated tasks' rows go.
        split: what is asked.
        skills: which LoRAs; default: all.
    """
    card: Mapping[str, Any] = zoo.skills()
    asked = {}
    for name in skills or card:
        source = card[name]["data"]
        if source.startswith("data:"):
            asked[name] = common.real(data / source.removeprefix("data:"), scratch, split, card[name]["metric"])
        else:
            asked[name] = common.generated(tasks.get(source), scratch, split)
    return {"base": "zoo", "experts": {name: f"zoo:{name}" for name in asked}, **comparison(asked)}


def comparison(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of the recipe, for any base: every method, on these tasks."""
    return {
        "compare": METHODS,
        "data": {"tasks": dict(asked), "train_items": 30, "test_items": 20},
        "train": {"steps": 100, "batch_size": 24, "seeds": [0, 1, 2]},
        "generation": common.GENERATION,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = common.parser(__doc__)
    parser.add_argument("--skills", type=common.chosen(list(zoo.skills())), help="default: all bundled")
    options = parser.parse_args(arguments)
    common.begin(options)
    content = recipe(options.data.resolve(), options.out.resolve() / "data", options.split, options.skills)
    content = common.changed(content, options.overrides)
    found = common.measure(content, options.out)
    made = common.results(found, [name for name in content["compare"] if name.startswith("mole")])
    title = f"Retention of {len(content['experts'])} skills"
    common.leave({title: made}, common.settings(content, options), options.out, options.commit)


if __name__ == "__main__":
    main()
