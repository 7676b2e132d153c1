"""How much of two skills every method keeps as more and more LoRAs stand beside theirs.

    python benchmarks/quality/skills.py --count 111 -o out/quality/loras
    python benchmarks/quality/growth.py --data DATA --loras out/quality/loras -o out/quality/growth
    python benchmarks/quality/growth.py --data DATA --loras out/quality/loras -o out/quality/growth --sizes 2,8,32

The LoRAs that join are first the other bundled ones, in the order of the card (those of generated tasks before those of
real sets), and then those of generated variants.
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
from quality import common, skills

SIZES = (2, 4, 8, 16, 32, 48, 64, 128)
PROBES = ("less", "owner_and_thing")
METHODS: dict[str, dict[str, Any]] = {
    "sum": {},
    "nla": {"name": "linear"},
    "lorahub": {},
    "pem": common.merged("concat"),
    "mole": {},
    "mole_top1": {"name": "mole", "activation": "top1"},
    "mole_top2": {"name": "mole", "activation": "topk", "k": 2},
    "mole_paper": common.PAPER,
}


def experts(count: int, probes: Sequence[str], loras: Path) -> dict[str, str]:
    """The first ``count`` experts, the probes first of all; those of variants are trained if they are missing."""
    named = {name: f"zoo:{name}" for name in dict.fromkeys([*probes, *zoo.skills()])}
    some: Mapping[str, Path] = skills.ready(max(0, count - len(named)), loras)
    return dict([*named.items(), *((name, str(place.resolve())) for name, place in some.items())][:count])


def recipe(count: int, probes: Sequence[str], loras: Path, scratch: Path, split: common.Split) -> dict[str, Any]:
    """``count`` LoRAs; what is learned from and asked are the tasks of the probes."""
    source = zoo.generated()
    return {
        "base": "zoo",
        "experts": experts(count, probes, loras),
        "compare": METHODS,
        "data": {
            "tasks": {name: common.generated(tasks.get(source[name]), scratch, split) for name in probes},
            "train_items": 100,
            "test_items": 50,
        },
        "train": {"steps": 60, "batch_size": 12, "seeds": [0, 1, 2]},
        "generation": {**common.GENERATION, "max_new_tokens": 28},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.numbers, default=list(SIZES), help="numbers of experts")
    parser.add_argument("--probes", type=common.chosen(list(zoo.generated())), default=list(PROBES))
    parser.add_argument("--loras", type=Path, required=True, help="where skills.py leaves the LoRAs of variants")
    options = parser.parse_args(arguments)
    common.begin(options)
    made, content = {}, {}
    for count in options.sizes:
        content = recipe(count, options.probes, options.loras, options.out.resolve() / "data", options.split)
        content = common.changed(content, options.overrides)
        found = common.measure(content, options.out)
        ours = [name for name in content["compare"] if name.startswith("mole")]
        made[f"{count} experts"] = common.results(found, ours)
    setting = common.settings(content, options) | {"probes": options.probes, "variants": skills.SETTINGS}
    common.leave(made, setting, options.out, options.commit)


if __name__ == "__main__":
    main()
