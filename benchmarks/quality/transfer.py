"""What a few examples of a held-out target make of the bundled LoRAs, beside a fresh LoRA from the same examples.

python benchmarks/quality/transfer.py --data DATA -o out/quality/transfer
python benchmarks/quality/transfer.py --data DATA -o out/quality/transfer --targets laptop --shots 5 train.seeds=[0]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from loraweave import zoo
from loraweave.evaluation.data import read_rows
from loraweave.files import write_text_atomic
from quality import common
from quality.compositions import composed

SHOTS = (5, 20, 100)
CONTROL = "control_czech"
REAL = {"laptop": "rnnlg/laptop", CONTROL: "multi30k/en-cs"}
TARGETS = (*composed(), *REAL)
# A set without training rows lends these of its validation rows.
_LENT = 500

METHODS: dict[str, dict[str, Any]] = {
    "nla": {"name": "linear"},
    "pem": common.merged("concat"),
    "lorahub": {"examples": None},
    "cat": {},
    "mole": {},
    "best_single": {},
    "fresh_lora": {"rank": 8, "learning_rate": 4e-3, "train": {"steps": 100}},
}


def task(name: str, data: Path, scratch: Path, split: common.Split) -> dict[str, str]:
    """The files of a target: to learn from, and to be asked."""
    if name not in REAL:
        return common.generated(composed()[name], scratch, split)
    folder = data / REAL[name]
    if (folder / "train.jsonl").exists():
        return common.real(folder, split)
    rows = [row for _, row in read_rows(folder / "validation.jsonl")]
    found = {"metric": "bleu", "test": str(folder / "test.jsonl")}
    for part, some in (("train", rows[:_LENT]), ("validation", rows[_LENT:])):
        path = scratch / f"{name}.{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, "".join(f"{json.dumps(row)}\n" for row in some))
        if part in ("train", split):
            found["train" if part == "train" else "test"] = str(path)
    return found


def recipe(target: str, shots: int, data: Path, scratch: Path, split: common.Split) -> dict[str, Any]:
    """All bundled LoRAs, and ``shots`` examples of a target that is none of theirs."""
    return {
        "base": "zoo",
        "experts": {name: f"zoo:{name}" for name in zoo.skills()},
        "compare": METHODS,
        "data": {"tasks": {target: task(target, data, scratch, split)}, "train_items": shots, "test_items": 40},
        "train": {"steps": 40, "batch_size": 24, "seeds": [0, 1, 2]},
        "generation": common.GENERATION,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = common.parser(__doc__)
    parser.add_argument("--targets", type=common.chosen(TARGETS), default=list(TARGETS))
    parser.add_argument("--shots", type=common.numbers, default=list(SHOTS), help="numbers of examples")
    options = parser.parse_args(arguments)
    common.begin(options)
    made, content = {}, {}
    for shots in options.shots:
        found = {}
        for target in options.targets:
            content = recipe(target, shots, options.data.resolve(), options.out.resolve() / "data", options.split)
            content = common.changed(content, [*options.overrides, f"data.train_items={shots}"])
            found[target] = common.measure(content, options.out)
        meant = [each for target, each in found.items() if target != CONTROL]
        for title, parts in (("", meant), (", the control", [found[CONTROL]] if CONTROL in found else [])):
            if parts:
                made[f"{shots} examples{title}"] = common.results(common.joined(parts))
    common.leave(made, common.settings(content, options) | {"shots": options.shots}, options.out, options.commit)


if __name__ == "__main__":
    main()
