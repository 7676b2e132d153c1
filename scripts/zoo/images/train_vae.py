"""Trains the autoencoder of the bundled image pipeline: 32 x 32 x 3 pixels to 16 x 16 x 8 latents, from nothing.

    python scripts/zoo/images/train_vae.py --data ../shared/data --minutes 9 --work out/zoo-images

It sees compositions of all tiles, held-out ones too. At the end each latent channel is given mean 0 and variance 1 by
changing the 1 x 1 convolutions around the latent, so that ``scaling_factor`` is 1.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from draw import Tiles, random_picture
from parallel import average, join, rate, save

from loraweave.zoo.images.elements import BASE, HELD_OUT, by_layer

BATCH = 8
LEARNING_RATE = 2e-3
KL = 1e-5
SEED = 0


def make() -> AutoencoderKL:
    """A fresh autoencoder, factor 2."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=16,
        sample_size=32,
        scaling_factor=1.0,
    )
    # Little noise in the latents from the start: the decoder learns colours before it learns to trust them.
    channels = vae.config.latent_channels
    torch.nn.init.zeros_(vae.quant_conv.weight[channels:])
    torch.nn.init.constant_(vae.quant_conv.bias[channels:], -7.0)
    return vae


def pictures(tiles: Tiles, rng: random.Random, n: int) -> torch.Tensor:
    """Random compositions of all elements, a quarter of them in other colours or as single tiles on a plain ground."""
    known = by_layer((*BASE, *HELD_OUT.values()))
    made = tiles.draw([random_picture(rng, known=known) for _ in range(n)])
    for i in range(n):
        draw = rng.random()
        if draw < 0.1:
            made[i] = made[i][torch.tensor(rng.sample(range(3), 3))] * rng.choice([1, -1])
        elif draw < 0.2:
            tile = tiles.everything[rng.randrange(len(tiles.everything))].float() / 255
            ground = torch.tensor([rng.uniform(-1, 1) for _ in range(3)]).view(3, 1, 1)
            made[i] = torch.lerp(ground.expand(3, 32, 32), tile[:3] * 2 - 1, tile[3:])
        elif draw < 0.25:  # greyscale with few levels, as style LoRAs draw
            grey = made[i].mean(0, keepdim=True)
            made[i] = (grey * 2).round().div(2).expand(3, 32, 32) * torch.tensor([1.0, 1.0, rng.uniform(0.3, 1)]).view(
                3, 1, 1
            )
    return made


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1 over ``images`` without changing what the pair does."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std.view(1, -1, 1, 1)


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, without sampling noise."""
    with torch.no_grad():
        made = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (made - images).pow(2).mean((1, 2, 3)))).mean().item()


def train(rank: int, args: argparse.Namespace) -> None:
    """One worker."""
    join(rank, args.workers, args.work)
    vae = make()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, spent, path = 0, 0.0, args.work / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    tiles = Tiles(args.data)
    rng = random.Random(f"{SEED}|{step}|{rank}")
    torch.manual_seed(rng.randrange(2**31))
    check = pictures(tiles, random.Random(1), 128)
    budget, began, saved, total = args.minutes * 60, time.time() - spent, spent, 0.0
    while spent < budget:
        images = pictures(tiles, rng, BATCH)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, spent, budget)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
        loss = (made - images).abs().mean() + KL * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, total = step + 1, total + loss.item()
        if step % 8 == 0:
            spent = average(parameters, time.time() - began)
        if rank == 0 and step % 100 == 0:
            print(f"step {step} {spent:.0f} s loss {total / 100:.4f}", flush=True)
            total = 0.0
        if rank == 0 and spent - saved > 60:
            saved = spent
            print(f"psnr {psnr(vae, check):.2f}", flush=True)
            save(path, {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent})
    if rank == 0:
        vae.eval()
        plain = psnr(vae, check)
        known = by_layer((*BASE, *HELD_OUT.values()))
        standardise(vae, tiles.draw([random_picture(rng, known=known) for _ in range(2048)]))
        print(f"done: {step} steps, psnr {plain:.2f}, standardised {psnr(vae, check):.2f}", flush=True)
        vae.save_pretrained(args.work / "vae")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Trains until the clock says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder of checkpoints")
    parser.add_argument("--minutes", type=float, default=9.0, help="training time in all, over restarts")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(train, args=(args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
