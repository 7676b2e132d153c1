"""Trains the two small CLIP models of the image pipeline: ``objective`` for training gates, ``metrics`` for scores.

    python scripts/zoo/images/train_clips.py --data ../shared/data --work out/zoo-images --minutes 4

They differ in width, depth, seed and pictures, so that what pleases one need not please the other. Both see all
elements, held-out ones under their trigger words. Half of the captions tell only a part of what is seen, so that
phrases for single elements can be scored as well. The two run side by side, each in one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from draw import Tiles, random_picture
from parallel import rate
from parts import LENGTH, ids, make_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from loraweave.zoo.images.elements import BASE, HELD_OUT, by_layer, caption

KINDS = {
    "objective": {"width": 96, "layers": 3, "patch": 8, "seed": 11},
    "metrics": {"width": 128, "layers": 2, "patch": 8, "seed": 12},
}
BATCH = 96
LEARNING_RATE = 1e-3
CHECKED = 256


def make(kind: str, vocabulary: int) -> CLIPModel:
    """A fresh model of one of KINDS."""
    shape = KINDS[kind]
    torch.manual_seed(shape["seed"])
    common = {
        "hidden_size": shape["width"],
        "intermediate_size": 2 * shape["width"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": 4,
    }
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **common,
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=shape["patch"], **common)
    joint = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=shape["width"])
    return CLIPModel(joint)


def pairs(tiles: Tiles, rng: random.Random, n: int, whole: float = 0.5) -> tuple[torch.Tensor, list[str]]:
    """Pictures in (-1, 1) with captions, of which a share tells everything."""
    known = by_layer((*BASE, *HELD_OUT.values()))
    drawn = [random_picture(rng, known=known) for _ in range(n)]
    told = []
    for picture in drawn:
        some = picture
        if rng.random() > whole:
            some = {k: v for k, v in picture.items() if k == "character" or rng.random() < 0.5}
        told.append(caption(some))
    return tiles.draw(drawn), told


def train(kind: str, data: Path, work: Path, minutes: float) -> None:
    """Trains one and writes ``work``/clip-``kind``; prints how often the right caption of 256 is the nearest."""
    torch.set_num_threads(1)
    folder = work / f"clip-{kind}"
    tokenizer = make_tokenizer(folder)
    model = make(kind, len(tokenizer)).train()
    tiles, rng = Tiles(data), random.Random(KINDS[kind]["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    budget, began, step, spent = minutes * 60, time.time(), 0, 0.0
    while spent < budget:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, spent, budget)
        images, told = pairs(tiles, rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids(tokenizer, told), pixel_values=images, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, spent = step + 1, time.time() - began
        if step % 50 == 0:
            print(f"{kind} step {step} {spent:.0f} s loss {loss.item():.3f}", flush=True)
    model.eval()
    images, told = pairs(tiles, random.Random(99), CHECKED, whole=1.0)
    with torch.no_grad():
        scores = model(input_ids=ids(tokenizer, told), pixel_values=images).logits_per_image
    found = (scores.argmax(1) == torch.arange(CHECKED)).float().mean().item()
    model.half().save_pretrained(folder)
    record = {"pictures": step * BATCH, "seconds": round(spent), "found_of_256": round(found, 3), **KINDS[kind]}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(kind, record, flush=True)


def main() -> None:
    """Trains both, each in a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder that the models go into")
    parser.add_argument("--minutes", type=float, default=4.0)
    args = parser.parse_args()
    context = get_context("spawn")
    runs = [context.Process(target=train, args=(kind, args.data, args.work, args.minutes)) for kind in KINDS]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    if any(run.exitcode for run in runs):
        raise SystemExit("a training failed")


if __name__ == "__main__":
    main()
