"""Composes 2 to 6 LoRAs of the bundled image zoo by every method, and measures the pictures against exact references.

    python benchmarks/images/run.py -o out/images --data DATA
    python benchmarks/images/run.py -o out/images --methods nla mole --seeds 0 --noises 1

``DATA`` holds the tiles (see README.md); without it the distances to exact pictures are left out. Every method paints
the same compositions from the same noise. A cell (method, seed) that is there already is not made again; ``--commit
NAME`` writes the tables to ``results/NAME.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loraweave as lw
from loraweave.evaluation.bootstrap import resampled
from loraweave.evaluation.compositions import MEASURES, CompositionJudge
from loraweave.evaluation.environment import environment
from loraweave.files import atomic_path, write_json_atomic, write_text_atomic
from loraweave.reporting.sheets import contact_sheet
from loraweave.zoo import images

RESULTS = Path(__file__).parent / "results"
CAST = ("floor", "cloak", "character", "clothing", "hand1", "hand2")
TRIED = ("acid", "scales", "tengu", "faerie", "plutonium", "quarter")
"""The cast on which settings are tried; no seed draws it."""
SIZES = (2, 3, 4, 5, 6)
NOISES = {2: 2, 3: 1, 4: 1, 5: 2, 6: 6}
"""Pictures of each composition: there are 5, 10, 10, 5 and 1 of these sizes."""
STEPS, BATCH = 60, 4
METHODS: dict[str, Any] = {
    "bare": lw.Sum(0.0),
    "merge": lw.Sum(),
    "nla": lw.Linear(),
    "switch": lw.Switch(),
    "composite": lw.Composite(),
    "mole": lw.MoLE(activation="sigmoid"),
    "mole_matrix": lw.MoLE("matrix", activation="linear", scale="experts"),
    "mole_softmax": lw.MoLE(),
    "mole_paper": lw.MoLE.paper(),
    "fused": lw.Sum(),
}
"""``fused``: of one LoRA, which gradient fusion (Mix-of-Show) makes for each composition."""
FUSING_STEPS = 5
"""Denoising steps in which each LoRA shows alone what it is given; most of the time goes into these."""
DISTANCES = ("distance", "element_distance")


def cast(seed: int) -> tuple[str, ...]:
    """Floor, cloak, character, clothing and what each hand holds: six LoRAs, bottom layer first; another every seed."""
    of_layer = [[n for n, e in images.HELD_OUT.items() if e.layer == layer] for layer in CAST]
    casts = [names for names in itertools.product(*of_layer) if names != TRIED]
    random.Random("casts").shuffle(casts)
    return casts[seed % len(casts)]


def composed(names: tuple[str, ...], seed: int, more: float = 0.0) -> list[images.Composition]:
    """Every set of 2 to 6 of a cast with its character; a floor that no LoRA brings is one of the base's.

    Args:
        names: the cast.
        seed: decides floors and further elements.
        more: how often a layer that is free gets an element that the base knows.
    """
    rng = random.Random(f"compositions {seed}")
    known = {layer: [e for e in images.BASE if e.layer == layer] for layer in images.LAYERS}
    character = next(name for name in names if images.HELD_OUT[name].layer == "character")
    made = []
    for size in SIZES:
        for chosen in itertools.combinations([name for name in names if name != character], size - 1):
            loras = tuple(name for name in names if name in (character, *chosen))
            elements = {"floor": rng.choice(known["floor"])}
            elements |= {layer: rng.choice(known[layer]) for layer in images.LAYERS[1:] if rng.random() < more}
            elements |= {images.HELD_OUT[name].layer: images.HELD_OUT[name] for name in loras}
            made.append(images.Composition(loras, images.caption(elements), elements))
    return made


def read_tiles(data: Path | None) -> Any:
    """What draws exact pictures, from the scripts that made the zoo."""
    if data is None:
        return None
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "zoo" / "images"))
    from draw import Tiles

    return Tiles(data)


def train_gates(mixture: lw.Mixture, seed: int, steps: int) -> dict[str, Any]:
    """Gates over a cast, by CLIP's judgement; the prompts are others than those that are painted."""
    names = mixture.experts
    painted = {one.prompt for one in composed(names, seed)}
    others = [one for extra in range(3) for one in composed(names, 1000 + 10 * seed + extra, more=0.4)]
    prompts = [(one.prompt, one.loras) for one in others if one.prompt not in painted]
    words = {name: images.HELD_OUT[name].words for name in names}
    guidance = lw.ClipGuidance("zoo:images/clip-objective", words, guidance=images.GUIDANCE)
    done = lw.train_images(mixture, prompts, guidance, steps=steps, batch_size=BATCH, seed=seed, progress=False)
    return {"steps": steps, "batch_size": BATCH, "seconds": round(done.seconds, 1), "loss": round(done.loss, 4)}


def told_alone(name: str, seed: int) -> str:
    """A caption of one LoRA's element with a character and a floor that the base knows, or its own."""
    rng = random.Random(f"told {name} {seed}")
    own = images.HELD_OUT[name]
    known = {layer: [e for e in images.BASE if e.layer == layer] for layer in ("character", "floor")}
    return images.caption({layer: rng.choice(of) for layer, of in known.items()} | {own.layer: own})


def fusion(pipe: Any, names: tuple[str, ...], seed: int) -> lw.GradientFusion:
    """What makes one LoRA of any of a cast's; each LoRA shows once what it is given."""
    experts = {name: f"zoo:images/{name}" for name in names}
    prompts = {name: told_alone(name, seed) for name in names}
    call = {"num_inference_steps": FUSING_STEPS, "guidance_scale": images.GUIDANCE}
    return lw.GradientFusion(pipe, experts, prompts, call=call, seed=seed, progress=False)


@contextmanager
def composing(pipe: Any, cast: lw.Mixture | lw.GradientFusion, loras: tuple[str, ...]) -> Iterator[None]:
    """Within the block the pipeline paints with these LoRAs of the cast: the mixture's, or their fusion."""
    if isinstance(cast, lw.Mixture):
        with cast.only(*loras):
            yield
        return
    fused = lw.attach(pipe, {"fused": cast.fuse(loras)}, METHODS["fused"])
    try:
        yield
    finally:
        fused.detach()


def distances(tiles: Any, one: images.Composition, picture: Any) -> dict[str, float]:
    """Mean squared distance to the exact picture (pixels in 0 to 1): whole, and where the LoRAs' elements show."""
    exact = tiles.draw([one.elements])[0] / 2 + 0.5
    own = {images.HELD_OUT[name].layer for name in one.loras}
    without = {layer: element for layer, element in one.elements.items() if layer not in own}
    shown = (tiles.draw([without])[0] / 2 + 0.5 - exact).abs().amax(0) > 0.02
    error = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - exact).pow(2).mean(0)
    return {"distance": error.mean().item(), "element_distance": error[shown].mean().item()}


def cell(label: str, seed: int, args: argparse.Namespace, tiles: Any, judge: CompositionJudge) -> dict[str, Any]:
    """Trains where there is something to train, and paints every composition of one cast."""
    pipe: Any = images.pipeline()
    pipe.set_progress_bar_config(disable=True)
    learned = None
    made: lw.Mixture | lw.GradientFusion
    if label == "fused":
        made = fusion(pipe, cast(seed), seed)
    else:
        made = lw.attach(pipe, {name: f"zoo:images/{name}" for name in cast(seed)}, METHODS[label])
        learned = train_gates(made, seed, args.steps) if label.startswith("mole") else None
    rows, began = [], time.perf_counter()
    for number, one in enumerate(composed(cast(seed), seed)):
        size = len(one.loras)
        noises = [
            torch.Generator().manual_seed(1000 * seed + 10 * number + n) for n in range(min(args.noises, NOISES[size]))
        ]
        with composing(pipe, made, one.loras):
            pictures = pipe(
                one.prompt,
                generator=noises,
                num_images_per_prompt=len(noises),
                num_inference_steps=images.STEPS,
                guidance_scale=images.GUIDANCE,
            ).images
        for n, (picture, scores) in enumerate(zip(pictures, judge.scores(one, pictures), strict=True)):
            with atomic_path(args.out / "pictures" / label / f"{seed}-{number}-{n}.png") as path:
                picture.save(path, format="PNG")
            far = {} if tiles is None else distances(tiles, one, picture)
            rows.append({"size": size, "number": number, "noise": n, "loras": one.loras, **scores, **far})
    seconds = (time.perf_counter() - began) / len(rows)
    return {"method": label, "seed": seed, "training": learned, "seconds": round(seconds, 3), "rows": rows}


def cell_settings(label: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """All that a cell's figures hang on; one made otherwise is made anew."""
    return {
        "loraweave": lw.__version__,
        "method": repr(METHODS[label]),
        "cast": list(cast(seed)),
        "pictures": {str(size): min(args.noises, NOISES[size]) for size in SIZES},
        "gates": [args.steps, BATCH] if label.startswith("mole") else None,
        "fusing": FUSING_STEPS if label == "fused" else None,
    }


def measured(cells: list[dict[str, Any]]) -> list[str]:
    """What all cells have, distances among it or not."""
    return [name for name in (*MEASURES, *DISTANCES) if all(name in row for c in cells for row in c["rows"])]


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method and size: mean over all pictures, and the spread of the seeds' means."""
    table: dict[str, Any] = {}
    for label in dict.fromkeys(c["method"] for c in cells):
        mine = [c for c in cells if c["method"] == label]
        table[label] = {"seconds": round(statistics.fmean(c["seconds"] for c in mine), 3)}
        for size in (*SIZES, "all"):
            of_seed = [[r for r in c["rows"] if size in ("all", r["size"])] for c in mine]
            for name in measured(mine):
                means = [statistics.fmean(r[name] for r in rows) for rows in of_seed]
                spread = statistics.stdev(means) if len(means) > 1 else 0.0
                table[label].setdefault(str(size), {})[name] = [round(statistics.fmean(means), 4), round(spread, 4)]
    return table


def differences(cells: list[dict[str, Any]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Paired bootstrap of the differences of two methods over seeds and compositions: value, low, high (95 %)."""
    tables = {}
    for cell in cells:
        tables.setdefault(cell["method"], []).append(cell["rows"])
    found: dict[str, Any] = {}
    for a, b in pairs:
        if a in tables and b in tables:
            for name in MEASURES:
                first, second = (np.array([[r[name] for r in rows] for rows in tables[label]]) for label in (a, b))
                found.setdefault(f"{a} - {b}", {})[name] = [round(v, 4) for v in resampled([first - second], [1.0])]
    return found


def markdown(results: dict[str, Any]) -> str:
    """Tables of every measure: methods down, sizes across."""
    titles = {
        "distinct": "Elements told (share told from all others of their layer)",
        "text": "Text alignment (cosine of picture and prompt)",
        "image": "Image alignment (mean cosine with exact pictures of each element)",
        "element_distance": "Squared distance to the exact picture where the elements lie (lower is better)",
        "distance": "Squared distance to the exact picture (lower is better)",
    }
    parts = []
    first = next(iter(results["summary"].values()))["all"]
    for name, title in titles.items():
        if name not in first:
            continue
        lines = [f"**{title}**", "", "| | N = 2 | 3 | 4 | 5 | 6 | all |", "|---|---:|---:|---:|---:|---:|---:|"]
        for label, row in results["summary"].items():
            figures = [f"{row[str(size)][name][0]:.3f} ± {row[str(size)][name][1]:.3f}" for size in (*SIZES, "all")]
            lines.append(f"| {label} | " + " | ".join(figures) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Makes the cells that are missing, then the tables and a sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--noises", type=int, default=6, help="at most so many pictures of each composition")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training gates")
    parser.add_argument("--commit", metavar="NAME", help="also keep the figures under results/")
    args = parser.parse_args()
    tiles, judge, cells = read_tiles(args.data), CompositionJudge(), []
    for seed in args.seeds:
        for label in args.methods:
            path = args.out / "cells" / f"{label}-{seed}.json"
            settings = cell_settings(label, seed, args)
            made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if made is None or made["settings"] != settings:
                made = cell(label, seed, args, tiles, judge) | {"settings": settings}
                write_json_atomic(path, made)
            cells.append(made)
            means = {n: round(statistics.fmean(row[n] for row in made["rows"]), 4) for n in measured([made])}
            print(label, seed, means, made["training"], made["seconds"], flush=True)
    pairs = [("mole", "nla"), ("mole", "merge"), ("mole_softmax", "nla"), ("composite", "merge"), ("mole", "composite")]
    pairs += [("fused", "nla"), ("fused", "merge"), ("mole", "fused")]
    pairs += [("mole_matrix", other) for other in ("nla", "merge", "mole")]
    results = {
        "summary": summary(cells),
        "differences": differences(cells, pairs),
        "seeds": args.seeds,
        "casts": [cast(seed) for seed in args.seeds],
        "training": next((c["training"] for c in cells if c["training"]), None),
        **environment(),
    }
    write_json_atomic(args.out / "results.json", results)
    print(markdown(results))
    sheet(args, [label for label in METHODS if label in args.methods])
    if args.commit:
        write_json_atomic(RESULTS / f"{args.commit}.json", results)
        write_text_atomic(RESULTS / f"{args.commit}.md", markdown(results))


def sheet(args: argparse.Namespace, labels: list[str]) -> None:
    """Every composition of the first cast by every method, from the same noise."""
    from PIL import Image

    rows, captions, seed = [], [], args.seeds[0]
    for number, one in enumerate(composed(cast(seed), seed)):
        files = [args.out / "pictures" / label / f"{seed}-{number}-0.png" for label in labels]
        rows.append([Image.open(file) for file in files])
        captions.append(" + ".join(one.loras))
    with atomic_path(args.out / "sheet.png") as path:
        contact_sheet(rows, labels, captions, 3).save(path, format="PNG")


if __name__ == "__main__":
    main()
