"""The work of ``loraweave demo --images``."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import loraweave as lw
from loraweave.evaluation.compositions import MEASURES, CompositionJudge
from loraweave.evaluation.environment import environment
from loraweave.files import atomic_path, check_replaceable, write_json_atomic
from loraweave.mixture import Mixture
from loraweave.reporting.sheets import contact_sheet
from loraweave.zoo import images

CAST = ("tengu", "faerie", "plutonium", "quarter", "acid")
"""A character, clothing, what each hand holds, and the floor."""
SHEET, RESULTS, MIXTURE = "sheet.png", "results.json", "mixture"
MOLE = "mole"
METHODS: dict[str, Any] = {
    "bare": lw.Sum(0.0),
    "merge": lw.Sum(),
    "nla": lw.Linear(),
    "switch": lw.Switch(),
    "composite": lw.Composite(),
}
_SCALE = 3


def demo(out: str | Path, *, seeds: int, steps: int, sets: int, denoising_steps: int) -> None:
    """Compose 2 to 5 bundled LoRAs by every method; leave pictures, scores and the trained mixture in ``out``.

    Args:
        out: a folder, new or from an earlier demo.
        seeds: pictures of each composition by each method.
        steps: of training the gates.
        sets: at most so many compositions of each size.
        denoising_steps: of each picture.

    Raises:
        LoraweaveError: ``out`` holds files of others.
    """
    place = Path(out)
    check_replaceable(place, ours=(SHEET, RESULTS, MIXTURE))
    began = time.perf_counter()
    pipe: Any = images.pipeline()
    pipe.set_progress_bar_config(disable=True)
    mixture = lw.attach(pipe, {name: f"zoo:images/{name}" for name in CAST}, lw.MoLE(activation="sigmoid"))
    composed = [one for size in range(2, len(CAST) + 1) for one in _compositions(size)[:sets]]
    every = [(one.prompt, one.loras) for size in range(2, len(CAST) + 1) for one in _compositions(size)]
    print(f"MoLE learns from {len(every)} prompts by CLIP's judgement, {steps} steps; then {len(METHODS) + 1} methods")
    guidance = lw.ClipGuidance(
        "zoo:images/clip-objective", {name: images.HELD_OUT[name].words for name in CAST}, guidance=images.GUIDANCE
    )
    trained = lw.train_images(mixture, every, guidance, steps=steps, batch_size=4, progress=sys.stderr.isatty())
    mixture.save_pretrained(place / MIXTURE)
    found: dict[str, Any] = {MOLE: _paint(mixture, MOLE, composed, seeds, denoising_steps)}
    for label, policy in METHODS.items():
        mixture.policy = policy
        found[label] = _paint(mixture, label, composed, seeds, denoising_steps)
    found = {label: found[label] for label in (*METHODS, MOLE)}
    judge = CompositionJudge()
    cells = []
    for label, (pictures, _) in found.items():
        for one, painted in zip(composed, pictures, strict=True):
            for seed, scores in enumerate(judge.scores(one, painted)):
                cells.append({"method": label, "loras": list(one.loras), "prompt": one.prompt, "seed": seed, **scores})
    summary = {label: _summary(label, cells) | {"seconds": found[label][1]} for label in found}
    rows = [[found[label][0][number][0] for label in found] for number in range(len(composed))]
    with atomic_path(place / SHEET) as path:
        captions = [f"{' + '.join(one.loras)}: {one.prompt}" for one in composed]
        contact_sheet(rows, list(found), captions, _SCALE).save(path, format="PNG")
    write_json_atomic(
        place / RESULTS,
        {
            "summary": summary,
            "pictures": cells,
            "training": {"steps": trained.steps, "seconds": round(trained.seconds, 1), "loss": trained.loss},
            "seconds": round(time.perf_counter() - began, 1),
            **environment(),
        },
    )
    Console().print(_table(summary))
    print(f"{place / SHEET}: the pictures; {place / RESULTS}: every number; {place / MIXTURE}: MoLE's mixture")


def _compositions(size: int) -> list[images.Composition]:
    """All sets of that size with the character; a floor that no LoRA brings is grass."""
    first, *others = CAST
    grass = next(e for e in images.BASE if e.words == "grass")
    made = []
    for chosen in itertools.combinations(others, size - 1):
        names = (first, *chosen)
        elements = {"floor": grass} | {images.HELD_OUT[name].layer: images.HELD_OUT[name] for name in names}
        made.append(images.Composition(names, images.caption(elements), elements))
    return made


def _paint(
    mixture: Mixture, label: str, composed: Sequence[images.Composition], seeds: int, steps: int
) -> tuple[list[list[Any]], float]:
    """Per composition a picture of each seed, with the other LoRAs masked; and the seconds a picture took."""
    pictures, began = [], time.perf_counter()
    for one in tqdm(composed, desc=label, unit="set", disable=not sys.stderr.isatty()):
        with mixture.only(*one.loras):
            call = {"num_inference_steps": steps, "guidance_scale": images.GUIDANCE, "num_images_per_prompt": seeds}
            noise = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
            pictures.append(mixture.pipeline(one.prompt, generator=noise, **call).images)
    return pictures, round((time.perf_counter() - began) / (seeds * len(composed)), 3)


def _summary(label: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [cell for cell in cells if cell["method"] == label]
    sizes = sorted({len(cell["loras"]) for cell in mine})
    means = {name: round(statistics.fmean(cell[name] for cell in mine), 4) for name in MEASURES}
    by_size = {
        str(size): round(statistics.fmean(c["distinct"] for c in mine if len(c["loras"]) == size), 4) for size in sizes
    }
    return means | {"distinct_by_size": by_size}


def _table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    sizes = list(next(iter(summary.values()))["distinct_by_size"])
    table.add_column("")
    for head in ("text", "image", "elements shown", *(f"of {size}" for size in sizes), "s/picture"):
        table.add_column(head, justify="right")
    for label, row in summary.items():
        shown = [f"{row['distinct']:.0%}", *(f"{row['distinct_by_size'][size]:.0%}" for size in sizes)]
        table.add_row(label, f"{row['text']:.3f}", f"{row['image']:.3f}", *shown, f"{row['seconds']:.2f}")
    return table
