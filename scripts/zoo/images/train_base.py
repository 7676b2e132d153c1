"""Trains the denoiser and the text encoder of the bundled image pipeline, from nothing, on endless random pictures.

    python scripts/zoo/images/train_base.py --data ../shared/data --minutes 55 --work out/zoo-images

Needs the autoencoder of train_vae.py under ``--work``. Runs for a number of minutes (the cosine follows the clock),
writes a checkpoint and sample pictures every few of them, and goes on from the last when started again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from draw import Tiles, random_picture, told
from parallel import average, join, rate, save
from parts import assemble, ids, make_scheduler, make_text_encoder, make_tokenizer, make_unet
from PIL import Image

from loraweave.zoo.images.elements import caption

BATCH = 64
NEW = 16  # of a batch's pictures are drawn and encoded for it; the others come from the last few thousand
POOL = 4096
LEARNING_RATE = 1e-3
NO_CAPTION = 0.1
LEAN = 1.3  # timesteps are 1000 u^LEAN: somewhat more of them with little noise
EMA = 0.998  # per 8 steps
SEED = 0
CHECKPOINT_MINUTES = 4.0


class Pool:
    """Latents and token ids of recent random pictures."""

    def __init__(self, tiles: Tiles, vae: AutoencoderKL, tokenizer, rng: random.Random) -> None:
        self.tiles, self.vae, self.tokenizer, self.rng = tiles, vae, tokenizer, rng
        self.latents, self.ids = self.fresh(512)
        self.at = 0

    @torch.no_grad()
    def fresh(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New pictures, encoded."""
        drawn = [random_picture(self.rng) for _ in range(n)]
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.vae.encode(self.tiles.draw(drawn)).latent_dist.mean.float()
        captions = ["" if self.rng.random() < NO_CAPTION else told(self.rng, picture) for picture in drawn]
        return latents, ids(self.tokenizer, captions)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """BATCH latents and ids, NEW of them new."""
        latents, tokens = self.fresh(NEW)
        chosen = torch.tensor(self.rng.sample(range(len(self.ids)), BATCH - NEW))
        made = torch.cat([latents, self.latents[chosen]]), torch.cat([tokens, self.ids[chosen]])
        if len(self.ids) < POOL:
            self.latents, self.ids = torch.cat([self.latents, latents]), torch.cat([self.ids, tokens])
        else:
            self.latents[self.at : self.at + NEW], self.ids[self.at : self.at + NEW] = latents, tokens
            self.at = (self.at + NEW) % POOL
        return made


def sheet(pipe, tiles: Tiles, path: Path, n: int = 12, steps: int = 20) -> float:
    """Writes pictures above their exact references; gives their mean squared distance (pixels in 0 to 1)."""
    rng = random.Random(5)
    drawn = [random_picture(rng) for _ in range(n)]
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        [caption(p) for p in drawn],
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    exact = tiles.draw(drawn) / 2 + 0.5
    rows = torch.cat([torch.cat(list(part), 2) for part in (made, exact)], 1)
    picture = Image.fromarray((rows.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy())
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)
    return (made - exact).pow(2).mean().item()


def train(rank: int, args: argparse.Namespace) -> None:
    """One worker. The first one logs, keeps the moving average, and saves."""
    join(rank, args.workers, args.work)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(args.work / "tokenizer" / str(rank))
    text, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval().requires_grad_(False)
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    slow = [p.detach().clone() for p in parameters]
    step, spent, path = 0, 0.0, args.work / "base.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["unet"])
        text.load_state_dict(state["text"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, slow = state["step"], state["spent"], state["slow"]
    tiles = Tiles(args.data)
    rng = random.Random(f"{SEED}|{step}|{rank}")
    torch.manual_seed(rng.randrange(2**31))
    pool = Pool(tiles, vae, tokenizer, rng)
    budget, began, saved, total = args.minutes * 60, time.time() - spent, spent, 0.0
    if rank == 0:
        print(sum(p.numel() for p in unet.parameters()), sum(p.numel() for p in text.parameters()), flush=True)
    while spent < budget:
        latents, tokens = pool.batch()
        noise = torch.randn_like(latents)
        when = (torch.rand(BATCH) ** LEAN * 1000).long()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(tokens).last_hidden_state
            made = unet(scheduler.add_noise(latents, noise, when), when, hidden).sample.float()
        loss = (made - scheduler.get_velocity(latents, noise, when)).pow(2).mean()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, spent, budget)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, total = step + 1, total + loss.item()
        if step % 8 == 0:
            spent = average(parameters, time.time() - began)
            if rank == 0:
                torch._foreach_lerp_(slow, [p.detach() for p in parameters], 1 - min(EMA, step / (step + 100)))
        if rank == 0 and step % 100 == 0:
            print(f"step {step} {spent:.0f} s loss {total / 100:.4f}", flush=True)
            total = 0.0
        if rank == 0 and step % 8 == 0 and (spent - saved > CHECKPOINT_MINUTES * 60 or spent >= budget):
            saved = spent
            state = {"unet": unet.state_dict(), "text": text.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, {**state, "step": step, "spent": spent, "slow": slow})
            smooth_unet, smooth_text = make_unet(), make_text_encoder(tokenizer)
            for parameter, value in zip([*smooth_unet.parameters(), *smooth_text.parameters()], slow, strict=True):
                parameter.data.copy_(value)
            pipe = assemble(smooth_unet, smooth_text, tokenizer, vae)
            distance = sheet(pipe, tiles, args.work / f"sample_{int(spent / 60):03d}.png")
            print(f"distance {distance:.4f}", flush=True)
            pipe.save_pretrained(args.work / "base")
            record = {"steps": step, "pictures": step * BATCH * args.workers, "seconds": round(spent), "seed": SEED}
            record |= {"distance": round(distance, 4)}
            (args.work / "base.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Trains until the clock says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-images"), help="folder of checkpoints and samples")
    parser.add_argument("--minutes", type=float, default=55.0, help="training time in all, over restarts")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    (args.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(train, args=(args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
