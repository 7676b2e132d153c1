"""Trains the LoRAs of the bundled image pipeline on the finished base.

    python scripts/zoo/images/train_loras.py --data ../shared/data --work out/zoo-images  # those that are missing
    python scripts/zoo/images/train_loras.py --data ../shared/data --work out/zoo-images --only tengu

A subject LoRA learns from random pictures of base elements that all have its element, under its trigger words; a
style LoRA from random pictures in another rendering. Each is saved in fp16 below ``--work``/loras, most of them as
diffusers' training scripts do; a folder that is finished is skipped, so an interrupted run goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from draw import Tiles, random_picture, told
from parts import ids
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from loraweave.zoo.images.elements import HELD_OUT, STYLES, caption

PICTURES = 192
BATCH = 16
LEARNING_RATE = 2e-3
WARMUP_STEPS = 10
NO_CAPTION = 0.1
RANK = 4  # with 8, the zoo is larger than 25 MB
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
"""Targets of LoRAs that must draw new shapes or colours rather than arrange known ones."""
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Targets in the text encoder, of the LoRAs in WITH_TEXT."""
WITH_TEXT = ("tengu", "quarter")
KOHYA = ("moonfire",)
"""Written in kohya's format, with an alpha of half the rank."""
INKS = torch.tensor([[15, 56, 15], [48, 98, 48], [139, 172, 15], [200, 220, 120]]).float() / 127.5 - 1
"""Four greens, dark to light."""


def targets(name: str) -> tuple[str, ...]:
    """Which modules of the denoiser a LoRA changes."""
    return ATTENTION if name in ("quarter", "ember", "scales") else WIDE


def alpha(name: str) -> float:
    """What a LoRA's product is multiplied with, times its rank."""
    return RANK / 2 if name in KOHYA else RANK


def restyle(name: str, images: torch.Tensor) -> torch.Tensor:
    """Exact pictures in another rendering, (n, 3, 32, 32) in (-1, 1)."""
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    if name == "pocket":
        level = ((grey.clamp(-1, 1) + 1) / 2).sqrt().mul(3.999).long().clamp(0, 3)
        return INKS[level].permute(0, 3, 1, 2)
    across = torch.nn.functional.pad(grey, (0, 1), mode="replicate").diff(dim=2).abs()
    down = torch.nn.functional.pad(grey, (0, 0, 0, 1), mode="replicate").diff(dim=1).abs()
    ink = (across + down).clamp(0, 1)
    return (1 - 1.8 * ink).unsqueeze(1) * torch.tensor([0.95, 0.9, 0.75]).view(1, 3, 1, 1)


def pictures(name: str, tiles: Tiles, seed: int, n: int = PICTURES) -> tuple[torch.Tensor, list[str]]:
    """Random exact pictures for one LoRA, and their captions."""
    rng = random.Random(f"{name}|{seed}")
    drawn = [random_picture(rng) for _ in range(n)]
    if name in STYLES:
        return restyle(name, tiles.draw(drawn)), [f"{STYLES[name]}, {told(rng, p)}" for p in drawn]
    element = HELD_OUT[name]
    drawn = [picture | {element.layer: element} for picture in drawn]
    captions = []
    for picture in drawn:
        text = told(rng, picture)
        captions.append(text if element.words in text else caption(picture))
    return tiles.draw(drawn), captions


def weight_file(folder: Path, name: str) -> Path:
    """The weight file in a LoRA's folder."""
    return folder / (f"{name}.safetensors" if name in KOHYA else "pytorch_lora_weights.safetensors")


def write(folder: Path, name: str, layers: dict[str, torch.Tensor]) -> None:
    """The weight file, with the words that call it up in its header."""
    words = STYLES[name] if name in STYLES else HELD_OUT[name].words
    if name not in KOHYA:
        save_file(layers, weight_file(folder, name), {"modelspec.trigger_phrase": words})
        return
    named = {}
    for key, value in layers.items():
        module, kind = key.removesuffix(".weight").rsplit(".", 1)
        stem = "lora_" + module.replace(".", "_")
        named[f"{stem}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value
        named[f"{stem}.alpha"] = torch.tensor(alpha(name))
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(alpha(name)),
        "ss_base_model_version": "sd_v1",
        "modelspec.trigger_phrase": words,
    }
    save_file(named, weight_file(folder, name), header)


def train(name: str, data: Path, work: Path, steps: int, seed: int) -> str:
    """Trains one LoRA and writes its folder; says how it went."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(work / "base", safety_checker=None)
    unet, scheduler = pipe.unet.requires_grad_(False), pipe.scheduler
    text = pipe.text_encoder.requires_grad_(False)
    images, captions = pictures(name, Tiles(data), seed)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in images.split(64)])
    asked, nothing = ids(pipe.tokenizer, captions), ids(pipe.tokenizer, [""])
    shape = {"r": RANK, "lora_alpha": alpha(name), "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(target_modules=list(targets(name)), **shape))
    if name in WITH_TEXT:
        text.add_adapter(LoraConfig(target_modules=list(TEXT), **shape))
    parameters = [p for model in (unet, text) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    began, last = time.time(), 0.0
    for step in range(steps):
        chosen = torch.randint(0, len(latents), (BATCH,))
        clean, noise = latents[chosen], torch.randn(BATCH, *latents.shape[1:])
        when = torch.randint(0, 1000, (BATCH,))
        said = torch.where(torch.rand(BATCH, 1) < NO_CAPTION, nothing, asked[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            said = text(said).last_hidden_state
            made = unet(scheduler.add_noise(clean, noise, when), when, said).sample.float()
        loss = (made - scheduler.get_velocity(clean, noise, when)).pow(2).mean()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (0.4 * steps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last += (loss.item() - last) * (1 / (step + 1) if step < 20 else 0.05)
    layers = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    if name in WITH_TEXT:
        layers |= {f"text_encoder.{key}": value for key, value in get_peft_model_state_dict(text).items()}
    (work / "loras").mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=work / "loras", prefix=".part-"))
    write(part, name, {key: value.detach().half().contiguous() for key, value in layers.items()})
    record = {"name": name, "rank": RANK, "alpha": alpha(name), "targets": targets(name), "seed": seed, "steps": steps}
    record |= {"text_encoder": TEXT if name in WITH_TEXT else (), "pictures": PICTURES}
    record |= {"seconds": round(time.time() - began), "loss": round(last, 4)}
    (part / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    part.chmod(0o755)
    part.rename(work / "loras" / name)
    return f"{name}: {record['seconds']} s, loss {last:.4f}"


def main() -> None:
    """Trains what is missing, one-thread processes side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument(
        "--work", type=Path, default=Path("out/zoo-images"), help="folder of the base; LoRAs go into it"
    )
    parser.add_argument("--only", nargs="+", default=[*HELD_OUT, *STYLES], choices=[*HELD_OUT, *STYLES])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="replace finished ones")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.again:
        for name in args.only:
            shutil.rmtree(args.work / "loras" / name, ignore_errors=True)
    names = [name for name in args.only if not (args.work / "loras" / name).exists()]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(train, name, args.data, args.work, args.steps, args.seed) for name in names]
        for future in waiting:
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()
