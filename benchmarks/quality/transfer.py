"""What a few examples of a held-out target make of the bundled LoRAs, beside a fresh LoRA from the same examples.

python benchmarks/quality/transfer.py --data DATA -o out/quality/transfer
python benchmarks/quality/transfer.py --data DATA -o out/quality/transfer --targets laptop --shots 5 train.seeds=[0]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from loraweave import zoo
from quality import common
from quality.compositions import composed

SHOTS = (5, 20, 100)
CONTROL = "control_czech"
REAL = {"laptop": "rnnlg/laptop", CONTROL: "multi30k/en-cs"}
TARGETS = (*composed(), *REAL)

METHODS: dict[str, dict[str, Any]] = {
    "nla": {"name": "linear"},
    "pem": common.merged("concat"),
    "lorahub": {"examples": None},
    "cat": {},
    "mole": {},
    "mole_matrix": {"name": "mole", "granularity": "matrix"},
    "mole_linear": {"name": "mole", "granularity": "matrix", "activation": "linear"},
    "best_single": {},
    "fresh_lora": {"rank": 8, "learning_rate": 4e-3, "train": {"steps": 100}},
}


def task(name: str, data: Path, scratch: Path, split: common.Split) -> dict[str, str]:
    """The files of a target: to learn from, and to be asked."""
    if name not in REAL:
        return common.generated(composed()[name], scratch, split)
    return common.real(data / REAL[name], scratch, split)


def recipe(target: Mapping[str, Any], base: str, experts: Mapping[str, str]) -> dict[str, Any]:
    """These experts, and a target that is none of theirs."""
    return {
        "base": base,
        "experts": dict(experts),
        "compare": METHODS,
        "data": {"tasks": dict(target), "test_items": 40},
        "train": {"steps": 40, "batch_size": 24, "seeds": [0, 1, 2]},
        "generation": common.GENERATION,
    }


def tables(
    recipes: Mapping[str, Mapping[str, Any]], shots: Sequence[int], overrides: Sequence[str], out: Path
) -> dict[str, Any]:
    """Every target with every number of examples: title -> results, the control apart.

    Args:
        recipes: target -> :func:`recipe`.
        shots: numbers of examples.
        overrides: ``FIELD=VALUE``.
        out: where the cells go.
    """
    made = {}
    for number in shots:
        given = [*overrides, f"data.train_items={number}"]
        found = {target: common.measure(common.changed(content, given), out) for target, content in recipes.items()}
        meant = [each for target, each in found.items() if target != CONTROL]
        for title, parts in (("", meant), (", the control", [found[CONTROL]] if CONTROL in found else [])):
            if parts:
                ours = [name for name in METHODS if name.startswith("mole")]
                made[f"{number} examples{title}"] = common.results(common.joined(parts), ours)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = common.parser(__doc__)
    parser.add_argument("--targets", type=common.chosen(TARGETS), default=list(TARGETS))
    parser.add_argument("--shots", type=common.numbers, default=list(SHOTS), help="numbers of examples")
    options = parser.parse_args(arguments)
    common.begin(options)
    data, scratch = options.data.resolve(), options.out.resolve() / "data"
    experts = {name: f"zoo:{name}" for name in zoo.skills()}
    recipes = {
        name: recipe({name: task(name, data, scratch, options.split)}, "zoo", experts) for name in options.targets
    }
    made = tables(recipes, options.shots, options.overrides, options.out)
    setting = common.settings(common.changed(next(iter(recipes.values())), options.overrides), options)
    common.leave(made, setting | {"shots": options.shots}, options.out, options.commit)


if __name__ == "__main__":
    main()
