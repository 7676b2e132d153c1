"""Scores each LoRA alone against the exact pictures, beside the base on the same prompts, and writes contact sheets.

    python scripts/zoo/images/evaluate.py --data ../shared/data --work out/zoo-images --prompts 64

For every LoRA the pictures are random compositions of another seed than its training. ``lora`` and ``base`` are mean
squared distances to the exact picture (pixels in 0 to 1); ``lora_element`` and ``base_element`` count only the pixels
that the LoRA's element changes. Lower is better. ``loras.png`` shows base and LoRA; ``exact.png`` the references too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from draw import Tiles
from PIL import Image
from train_loras import pictures, weight_file

from loraweave.zoo.images.elements import HELD_OUT, STYLES

SEED = 1_000
STEPS = 25
GUIDANCE = 3.0
SHOWN = 6


def paint(pipe: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """Pictures in 0 to 1, (n, 3, 32, 32), the same noise at every call."""
    generator = torch.Generator().manual_seed(SEED)
    made: torch.Tensor = pipe(
        captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, output_type="pt"
    ).images
    return made.float()


def changed(name: str, tiles: Tiles) -> torch.Tensor:
    """Where a LoRA's element lies, (32, 32), 1 or 0; everywhere for a style."""
    if name in STYLES:
        return torch.ones(32, 32)
    return (tiles.tiles[tiles.number[HELD_OUT[name]], 3] > 0.5).float()


def write_sheet(rows: list[list[torch.Tensor]], path: Path, columns: int = 3) -> None:
    """The first pictures of each LoRA, one set under the other, LoRAs in columns."""
    cells = [torch.cat([torch.cat(list(part[:SHOWN]), 2) for part in row], 1) for row in rows]
    cells = [torch.nn.functional.pad(cell, (0, 4, 0, 4), value=1.0) for cell in cells]
    cells += [torch.ones_like(cells[0])] * (-len(cells) % columns)
    whole = torch.cat([torch.cat(cells[i : i + columns], 2) for i in range(0, len(cells), columns)], 1)
    picture = Image.fromarray((whole.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy())
    size = (picture.width * 2, picture.height * 2)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Scores all LoRAs found under ``--work``/loras."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder of the base and the LoRAs")
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiles = Tiles(args.data)
    pipe = StableDiffusionPipeline.from_pretrained(args.work / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    scores, shown, exacts = {"prompts": args.prompts}, [], []
    for name in (*HELD_OUT, *STYLES):
        file = weight_file(args.work / "loras" / name, name)
        if not file.exists():
            continue
        exact, captions = pictures(name, tiles, SEED, args.prompts)
        exact = exact / 2 + 0.5
        plain = paint(pipe, captions)
        pipe.load_lora_weights(file, adapter_name=name)
        made = paint(pipe, captions)
        pipe.unload_lora_weights()
        mask = changed(name, tiles)
        score = {}
        for key, images in (("base", plain), ("lora", made)):
            error = (images - exact).pow(2).mean(1)
            score[key] = error.mean().item()
            score[f"{key}_element"] = ((error * mask).sum((1, 2)) / mask.sum()).mean().item()
        scores[name] = {key: round(value, 4) for key, value in score.items()}
        print(name, scores[name], flush=True)
        shown.append([plain, made])
        exacts.append([plain, made, exact])
    (args.work / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_sheet(shown, args.work / "loras.png")
    write_sheet(exacts, args.work / "exact.png")


if __name__ == "__main__":
    main()
