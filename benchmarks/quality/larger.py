"""Retention and few-shot transfer on the larger base: real skills in two languages, and targets composed of them.

    python benchmarks/quality/larger_base.py --data DATA
    python benchmarks/quality/larger.py --data DATA -o out/quality/larger
    python benchmarks/quality/larger.py --data DATA -o out/quality/larger --tables transfer --shots 20 train.seeds=[0]

LoRAs that are missing are trained first (``out/loras``); so are those of ``CEILINGS``, which learn a target from all of
its rows: they compete nowhere, and say what there is to be reached.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "zoo"))

from loras import ALL, Lora
from train_loras import make_all

from quality import common, retention, transfer

_SHAPE: dict[str, Any] = {
    "rank": 16,
    "alpha": 32,
    "targets": ALL,
    "learning_rate": 3e-3,
    "batch_tokens": 2000,
    "metric": "bleu",
}
_LABELS = _SHAPE | {"rank": 8, "alpha": 16, "metric": "accuracy"}
_WORDS = _SHAPE | {"rank": 32, "alpha": 64}

SKILLS = (
    Lora("en_de", "data:multi30k/en-de", **_WORDS, steps=1000),
    Lora("en_fr", "data:multi30k/en-fr", **_WORDS, steps=1000),
    Lora("keywords", "data:caption_keywords/en", **_SHAPE, steps=500),
    Lora("webnlg", "data:webnlg", **_SHAPE, steps=700),
    Lora("e2e", "data:e2e", **_SHAPE, steps=350),
    Lora("tv", "data:rnnlg/tv", **_SHAPE, steps=400),
    Lora("hotel", "data:rnnlg/hotel", **_SHAPE, steps=250),
    Lora("restaurant", "data:rnnlg/restaurant", **_SHAPE, steps=250),
    Lora("sentiment", "data:sst2", **_LABELS, steps=250),
    Lora("news", "data:ag_news_testpart", **_LABELS, steps=200),
)
"""The LoRAs that are mixed. All floors are in the README."""

CEILINGS = (
    Lora("laptop", "data:rnnlg/laptop", **_SHAPE, steps=500),
    Lora("keywords_german", "data:caption_keywords/de", **_WORDS, steps=700),
)

TARGETS = {
    "laptop": "rnnlg/laptop",  # tv, hotel and restaurant
    "keywords_german": "caption_keywords/de",  # keywords, and English to German
    "german_french": "multi30k/de-fr",  # English to French, on a base that reads German
    "webnlg_german": "webnlg_de",  # webnlg, and English to German
    transfer.CONTROL: transfer.REAL[transfer.CONTROL],  # nothing here writes Czech
}


def place(lora: Lora, data: Path) -> Path:
    """The folder of a LoRA's set."""
    return data / lora.data.removeprefix("data:")


def ready(loras: Sequence[Lora], data: Path, base: Path, folder: Path) -> dict[str, str]:
    """The folders of these LoRAs by name; those that are missing are trained."""
    make_all([lora for lora in loras if not (folder / lora.name).exists()], data, base, folder)
    return {lora.name: str(folder / lora.name) for lora in loras}


def retention_recipe(base: Path, experts: Mapping[str, str], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """As for the bundled skills."""
    return {"base": str(base), "experts": dict(experts), **retention.comparison(tasks)}


def ceilings(base: Path, experts: Mapping[str, str], tasks: Mapping[str, Any], out: Path) -> dict[str, float]:
    """Target -> what its own LoRA scores on the items that the mixtures are asked."""
    found = {}
    for name, folder in experts.items():
        if name in tasks:
            content = transfer.recipe({name: tasks[name]}, str(base), {name: folder}) | {"compare": {"sum": {}}}
            found |= common.measure(content, out).own
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = common.parser(__doc__)
    parser.add_argument("--base", type=Path, help="folder of the larger base; default: base, in the folder of -o")
    parser.add_argument("--tables", type=common.chosen(["retention", "transfer"]), default=["retention", "transfer"])
    parser.add_argument("--targets", type=common.chosen(list(TARGETS)), default=list(TARGETS))
    parser.add_argument("--shots", type=common.numbers, default=list(transfer.SHOTS), help="numbers of examples")
    options = parser.parse_args(arguments)
    common.begin(options)
    data, out = options.data.resolve(), options.out.resolve()
    base, scratch = (options.base or out / "base").resolve(), out / "data"
    experts = ready(SKILLS, data, base, out / "loras")
    made: dict[str, Any] = {}
    setting: dict[str, Any] = {"shots": options.shots}
    if "retention" in options.tables:
        tasks = {lora.name: common.real(place(lora, data), scratch, options.split, lora.metric) for lora in SKILLS}
        content = common.changed(retention_recipe(base, experts, tasks), options.overrides)
        ours = [name for name in content["compare"] if name.startswith("mole")]
        made[f"Retention of {len(tasks)} skills"] = common.results(common.measure(content, out), ours)
        setting["retention"] = common.settings(content, options)
    if "transfer" in options.tables:
        targets = {name: common.real(data / TARGETS[name], scratch, options.split) for name in options.targets}
        recipes = {name: transfer.recipe({name: task}, str(base), experts) for name, task in targets.items()}
        learnt = ready(CEILINGS, data, base, out / "loras")
        reached = ceilings(base, learnt, targets, out)
        few = transfer.tables(recipes, options.shots, options.overrides, out)
        made |= {title: table | {"ceilings": reached} for title, table in few.items()}
        setting["transfer"] = common.settings(common.changed(next(iter(recipes.values())), options.overrides), options)
    common.leave(made, setting, out, options.commit)


if __name__ == "__main__":
    main()
