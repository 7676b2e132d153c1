"""Puts the finished image zoo into the package: weights in fp16, feature vectors of references, and both cards.

    python scripts/zoo/images/bundle.py --data ../shared/data --work out/zoo-images
    python scripts/zoo/images/bundle.py --work out/zoo-images --only-shifts  # the rest stays as it is

Run it after train_vae, train_base, train_loras, train_clips and evaluate; shifts are trained on what is bundled, and
put in afterwards. What was there before is replaced. Pictures of the data set stay out of the package: the sheet in
docs shows what the models paint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from draw import Tiles
from evaluate import GUIDANCE, STEPS
from safetensors.torch import save_file
from train_loras import pictures, weight_file
from train_shifts import base_hash
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from loraweave.zoo import images
from loraweave.zoo.images.elements import BASE, HELD_OUT, STYLES

PACKAGE = Path(images.__file__).parent
SHEET = Path(__file__).parents[3] / "docs" / "zoo_images.png"
REFERENCES = 64
SEED = 2_000


def copy_base(work: Path, out: Path) -> None:
    """The pipeline in fp16."""
    pipe = StableDiffusionPipeline.from_pretrained(work / "base", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(out / "base")


def copy_clips(work: Path, out: Path) -> None:
    """Both CLIP models in fp16, with the processor for pictures as they are."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for name in images.CLIPS:
        CLIPModel.from_pretrained(work / name, dtype=torch.float16).save_pretrained(out / name)
        CLIPTokenizer.from_pretrained(work / name).save_pretrained(out / name)
        processor.save_pretrained(out / name)


@torch.no_grad()
def references(data: Path, work: Path) -> dict[str, torch.Tensor]:
    """Per LoRA, the mean unit feature vector of exact pictures that show what it paints."""
    tiles = Tiles(data)
    clip = CLIPModel.from_pretrained(work / "clip-metrics", dtype=torch.float32).eval()
    found = {}
    for name in (*HELD_OUT, *STYLES):
        exact, _ = pictures(name, tiles, SEED, REFERENCES)
        features = clip.get_image_features(pixel_values=exact)
        features = getattr(features, "pooler_output", features)
        found[name] = torch.nn.functional.normalize(features, dim=-1).mean(0)
    return found


def copy_shifts(work: Path, out: Path) -> dict[str, dict]:
    """Spectral shifts that train_shifts made, and what the card says of them."""
    shutil.rmtree(out / "shifts", ignore_errors=True)
    entries = {}
    for name in (*HELD_OUT, *STYLES):
        folder = work / "shifts" / name
        if not folder.exists():
            continue
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if record["base"] != base_hash():
            raise SystemExit(f"{folder}: trained on another base; run train_shifts.py --again")
        (out / "shifts").mkdir(exist_ok=True)
        shutil.copyfile(folder / f"{name}.safetensors", out / "shifts" / f"{name}.safetensors")
        entries[name] = {key: value for key, value in record.items() if key != "name"}
    return entries


def described(work: Path) -> dict[str, dict]:
    """What the card says of each LoRA."""
    scores = json.loads((work / "scores.json").read_text(encoding="utf-8"))
    entries = {}
    for name in (*HELD_OUT, *STYLES):
        record = json.loads((work / "loras" / name / "training.json").read_text(encoding="utf-8"))
        element = HELD_OUT.get(name)
        entries[name] = {
            "words": STYLES[name] if element is None else element.words,
            "layer": "style" if element is None else element.layer,
            "format": "kohya" if (work / "loras" / name / f"{name}.safetensors").exists() else "diffusers",
            "scores": scores[name],
            **{key: value for key, value in record.items() if key not in ("name", "pictures")},
        }
    return entries


def markdown(card: dict) -> str:
    """The card for people."""
    rows = []
    for name, entry in card["loras"].items():
        score = entry["scores"]
        where = "attention" if len(entry["targets"]) == 4 else "attention, feed-forward, convolutions"
        where += ", text encoder" if entry["text_encoder"] else ""
        cells = [f"`{name}`", entry["layer"], entry["words"], f"{score['base_element']:.3f}"]
        cells += [f"**{score['lora_element']:.3f}**", where, entry["format"], f"{entry['seconds']} s"]
        rows.append("| " + " | ".join(cells) + " |")
    base = card["base"]
    unet, text, vae = (f"{base[part] / 1e6:.2f} M" for part in ("unet", "text", "vae"))
    shifts = shifts_markdown(card) if card["shifts"] else ""
    first, second = (f"{card['clips'][name]['found_of_256']:.0%}" for name in images.CLIPS)
    return f"""# The bundled image zoo

A Stable Diffusion pipeline of small size (32 x 32 pixels), trained from nothing, and {len(card["loras"])} LoRAs for it.
They serve demos, tests and benchmarks: real enough to fight when summed, small enough for a laptop. **Not** for other
use.

This file is written by `scripts/zoo/images/bundle.py` from the same figures as `card.json`.

## LoRAs

![what each LoRA paints: the base above, with the LoRA below](../../../../docs/zoo_images.png)

*base* and *LoRA* are mean squared distances (pixels in 0 to 1) to the exact picture where the element lies, on
{card["prompts"]} random compositions that training has not seen, {STEPS} steps, guidance {GUIDANCE:g}. Lower is better.
In the sheet each LoRA has two rows: the bare base, and the base with the LoRA, on the same prompts and noise.

| LoRA | layer | words | base | LoRA | on | format | time |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Rank {card["rank"]}, AdamW, {card["steps"]} steps of 16 pictures, one CPU thread each
(`scripts/zoo/images/train_loras.py`, seed 0). The LoRA in kohya's format has an alpha of half its rank.
{shifts}
## Base and CLIPs

UNet of {unet} parameters, text encoder {text}, autoencoder {vae} (latents 16 x 16 x 8); trained on
{base["pictures"]:,} captioned random pictures of {base["elements"]} elements in {base["seconds"] / 60:.0f} minutes on 2
CPU cores. It never saw the elements of the LoRAs; their words are in its vocabulary. Squared distance of its pictures
to the exact ones on a dozen captions, 20 steps: {base["distance"]:.4f}.

`clip-objective` (for teaching gates) and `clip-metrics` (for scores) were trained apart, with other shapes and
pictures; of 256 exact pictures they find the right caption for {first} and {second}. `references.safetensors` holds
mean feature vectors of {REFERENCES} exact pictures per LoRA, by `clip-metrics`.

## Sources and licences

All was trained on the tiles of Dungeon Crawl Stone Soup, crawl/tiles, release of Nov 2015: CC0. No picture of it is
part of the package. Code and weights here: Apache-2.0.
"""


def shifts_markdown(card: dict) -> str:
    """The card's part on spectral shifts."""
    rows = []
    for name, entry in card["shifts"].items():
        lora, own = card["loras"][name]["scores"], entry["scores"]["shifts_element"]
        cells = [f"`{name}`", f"{lora['base_element']:.3f}", f"**{own:.3f}**", f"{lora['lora_element']:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    one = next(iter(card["shifts"].values()))
    return f"""
## Spectral shifts

Of the same elements, learned from the same pictures: SVDiff's shifts of the denoiser's singular values, for
comparisons (`zoo:images/shifts/NAME`). Distances as above.

| shifts | base | shifts | LoRA |
|---|---|---|---|
{chr(10).join(rows)}

Adam at a constant {one["learning_rate"]:g}, {one["steps"]} steps of {one["batch_size"]} pictures, one CPU thread each
(`scripts/zoo/images/train_shifts.py`, seed {one["seed"]}).
"""


def size(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    """Writes weights, cards and the sheet into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder of all that was trained")
    parser.add_argument("--only-shifts", action="store_true", help="put in the spectral shifts, and keep the rest")
    args = parser.parse_args()
    out = PACKAGE / "weights"
    if args.only_shifts:
        write_card({**images.card(), "shifts": copy_shifts(args.work, out)})
        return
    shutil.rmtree(out, ignore_errors=True)
    (out / "loras").mkdir(parents=True)
    copy_base(args.work, out)
    copy_clips(args.work, out)
    for name in (*HELD_OUT, *STYLES):
        shutil.copyfile(weight_file(args.work / "loras" / name, name), out / "loras" / f"{name}.safetensors")
    save_file(references(args.data, args.work), out / "references.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(args.work / "base", safety_checker=None)
    entries = described(args.work)
    card = {
        "base": {
            "unet": size(pipe.unet),
            "text": size(pipe.text_encoder),
            "vae": size(pipe.vae),
            "elements": len(BASE),
            **json.loads((args.work / "base.json").read_text(encoding="utf-8")),
        },
        "clips": {n: json.loads((args.work / n / "training.json").read_text(encoding="utf-8")) for n in images.CLIPS},
        "prompts": json.loads((args.work / "scores.json").read_text(encoding="utf-8"))["prompts"],
        "rank": next(iter(entries.values()))["rank"],
        "steps": next(iter(entries.values()))["steps"],
        "loras": entries,
        "shifts": copy_shifts(args.work, out),
    }
    shutil.copyfile(args.work / "loras.png", SHEET)
    write_card(card)


def write_card(card: dict) -> None:
    """Both cards; and everybody may read what is bundled."""
    (PACKAGE / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (PACKAGE / "CARD.md").write_text(markdown(card), encoding="utf-8")
    out = PACKAGE / "weights"
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(f"{sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
