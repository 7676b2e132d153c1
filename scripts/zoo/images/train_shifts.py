"""Trains SVDiff's spectral shifts on the bundled pipeline, a rival of the LoRAs, and scores each alone.

    python scripts/zoo/images/train_shifts.py --data ../shared/data --work out/zoo-images  # those that are missing
    python scripts/zoo/images/train_shifts.py --data ../shared/data --work out/zoo-images --only tengu --steps 800
    python scripts/zoo/images/bundle.py --work out/zoo-images --only-shifts

Each learns from the pictures and captions that the LoRA of its name learned from, by the denoising loss at a constant
rate; the denoiser alone is shifted. Saved below ``--work``/shifts in fp16, without the norms' shifts, which are too
small to matter; what is scored is what is saved. Scores are those of evaluate.py, on the same pictures and noise. A
folder that is finished is skipped, so an interrupted run goes on with the next.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from draw import Tiles
from evaluate import SEED, changed, paint
from safetensors.torch import save_file
from train_loras import pictures

from loraweave.integrations.svdiff import apply_shifts, read_shifts
from loraweave.training.images.svdiff import train_shifts
from loraweave.zoo import images
from loraweave.zoo.images.elements import HELD_OUT

NAMES = ("gargoyle", "tengu", "lava", "faerie", "ember", "jester", "scales", "plutonium", "moonfire", "quarter",
         "diamond", "acid")  # fmt: skip
"""The elements that the small forms of recipes/mole compose."""
BATCH = 8
LEARNING_RATE = 1e-2
"""SVDiff's own 1e-3 moves little in so few steps."""


def base_hash() -> str:
    """Tells the bundled denoiser, which alone the shifts fit, from others."""
    weights = images.base_path() / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def score(name: str, pipe: Any, tiles: Tiles, prompts: int) -> dict[str, float]:
    """Mean squared distances to the exact pictures: whole, and where the element lies."""
    exact, captions = pictures(name, tiles, SEED, prompts)
    error = (paint(pipe, captions) - (exact / 2 + 0.5)).pow(2).mean(1)
    mask = changed(name, tiles)
    element = ((error * mask).sum((1, 2)) / mask.sum()).mean().item()
    return {"shifts": round(error.mean().item(), 4), "shifts_element": round(element, 4)}


def train(name: str, data: Path, work: Path, steps: int, seed: int, prompts: int) -> str:
    """Trains one element's shifts and writes their folder; says how it went."""
    torch.set_num_threads(1)
    pipe: Any = images.pipeline()
    pipe.set_progress_bar_config(disable=True)
    tiles = Tiles(data)
    exact, captions = pictures(name, tiles, seed)
    drawn = ((exact / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    options = {"steps": steps, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "seed": seed}
    began = time.time()
    trained = train_shifts(
        pipe, list(zip(drawn, captions, strict=True)), gradient_checkpointing=False, progress=False, **options
    )
    seconds, last = round(time.time() - began), trained.losses[-len(trained.losses) // 10 :]
    kept = {f"{path}.delta": d.half() for path, d in trained.shifts["unet"].items() if d.numel() > 1}
    (work / "shifts").mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=work / "shifts", prefix=".part-"))
    save_file(kept, part / f"{name}.safetensors")
    with apply_shifts(pipe.unet, read_shifts(part / f"{name}.safetensors")):
        scores = score(name, pipe, tiles, prompts)
    record = {"name": name, "scores": scores, **options, "seconds": seconds, "loss": round(sum(last) / len(last), 4)}
    record["base"] = base_hash()
    (part / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    part.chmod(0o755)
    part.rename(work / "shifts" / name)
    return f"{name}: {seconds} s, loss {record['loss']}, {scores}"


def main() -> None:
    """Trains what is missing, one-thread processes side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder that shifts go into")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=list(HELD_OUT))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=images.card()["prompts"], help="of the scores")
    parser.add_argument("--again", action="store_true", help="replace finished ones")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.again:
        for name in args.only:
            shutil.rmtree(args.work / "shifts" / name, ignore_errors=True)
    names = [name for name in args.only if not (args.work / "shifts" / name).exists()]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(train, name, args.data, args.work, args.steps, args.seed, args.prompts) for name in names
        ]
        for future in waiting:
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()
