"""Trains the LoRAs of the bundled zoo on the finished base.

    python scripts/zoo/train_loras.py --data ../shared/data            # those that are missing
    python scripts/zoo/train_loras.py --data ../shared/data --only hotel tv --again

Each is trained on the base's rounded weights and saved as an ordinary PEFT folder in fp16. A folder that exists is
skipped, so an interrupted run goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from loras import LORAS, Lora
from mix import Row, draw, read_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from settings import BASE_DIR, BASE_NAME, LORA_DIR
from tqdm import tqdm
from train_base import batches, encode, tensors
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

ROWS = 12_000  # at most so many generated rows; small tasks give all they have
WARMUP_STEPS = 30
RECORD = "training.json"


def rows_of(lora: Lora, data: Path) -> list[Row]:
    """Training rows of a LoRA."""
    if lora.generated:
        found = draw(lora.data, ROWS, lora.seed, "train")
    else:
        found = read_jsonl(data / lora.data.removeprefix("data:") / "train.jsonl")
    return [(lora.name, row["input"], row["target"]) for row in found]


def attach(base: Path, lora: Lora) -> PeftModel:
    """The base in fp32 with a fresh LoRA."""
    model = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(lora.seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        rank_pattern=lora.rank_pattern,
        task_type="SEQ_2_SEQ_LM",
    )
    return get_peft_model(model, config)


def train(lora: Lora, model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row], bf16: bool) -> float:
    """Trains in place; returns the mean loss a token over the last fifth of the steps."""
    encoded = encode(tokenizer, rows)
    stream = batches(encoded, lora.batch_tokens, random.Random(f"lora|{lora.name}|{lora.seed}"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lora.learning_rate, weight_decay=0.0, fused=True)
    losses: list[float] = []
    model.train()
    bar = tqdm(range(lora.steps), desc=lora.name, mininterval=15)
    for step in bar:
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / lora.steps))
        for group in optimizer.param_groups:
            group["lr"] = lora.learning_rate * max(scale, 0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**tensors(next(stream))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    tail = losses[-max(1, lora.steps // 5) :]
    return sum(tail) / len(tail)


def save(model: PeftModel, folder: Path, record: dict[str, float], base_name: str = BASE_NAME) -> None:
    """Writes the PEFT folder in fp16, whole or not at all; of the base it names no place, only the name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(staging, save_embedding_layers=False)
    (staging / "README.md").unlink(missing_ok=True)
    (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staging.chmod(0o755)
    for path in staging.iterdir():
        path.chmod(0o644)
    os.replace(staging, folder)


def make(lora: Lora, data: Path, base: Path, out: Path, bf16: bool = True) -> str:
    """Trains and saves one LoRA; returns a line for the log."""
    torch.set_num_threads(1)
    began = time.time()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = attach(base, lora)
    loss = train(lora, model, tokenizer, rows_of(lora, data), bf16)
    seconds = time.time() - began
    record = {"steps": lora.steps, "seconds": round(seconds, 1), "final_loss": round(loss, 4)}
    save(model, out / lora.name, record, BASE_NAME if base == BASE_DIR else base.name)
    return f"{lora.name}: loss {loss:.3f} after {seconds:.0f} s"


def make_all(loras: Sequence[Lora], data: Path, base: Path, out: Path, bf16: bool = True, workers: int = 2) -> None:
    """Trains and saves them, some at a time, each with one thread."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(make, lora, data, base, out, bf16) for lora in loras]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="LoRAs"):
            tqdm.write(job.result())


def _scaled(lora: Lora, steps: float, rate: float) -> Lora:
    return replace(lora, steps=max(1, round(lora.steps * steps)), learning_rate=lora.learning_rate * rate)


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--base", type=Path, default=BASE_DIR)
    parser.add_argument("--out", type=Path, default=LORA_DIR)
    parser.add_argument("--only", nargs="+", choices=[lora.name for lora in LORAS], help="train only these")
    parser.add_argument("--again", action="store_true", help="also those that exist")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps, for a trial")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rate, for a trial")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="LoRAs trained at a time, with one thread each")
    args = parser.parse_args()
    named = {lora.name: lora for lora in LORAS}
    chosen = [named[name] for name in args.only] if args.only else list(LORAS)
    chosen = [lora for lora in chosen if args.again or not (args.out / lora.name).exists()]
    scaled = [_scaled(lora, args.scale, args.rate) for lora in chosen]
    make_all(scaled, args.data, args.base, args.out, not args.no_bf16, args.workers)


if __name__ == "__main__":
    main()
