"""Trains the LoRAs that a table needs beyond the bundled ones, on the bundled base; one PEFT folder each, resumable.

    python benchmarks/quality/skills.py --count 111 -o out/quality/loras        # of generated variants, for growth.py

A folder that exists is skipped. How the LoRAs are trained is ``scripts/zoo/train_loras.py``; here are their shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from loraweave import zoo
from loraweave.zoo.tasks import Task
from quality.variants import label, variants

ZOO_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "zoo"
ROWS = 1_000
SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "targets": ("q", "k", "v", "o"),
    "steps": 60,
    "learning_rate": 8e-3,
    "batch_tokens": 500,
}


def train_variant(task: Task, folder: Path, **changed: Any) -> float:
    """Train and save the LoRA of a variant; returns its last training loss.

    Args:
        task: what it learns, from :func:`quality.variants.variants`.
        folder: where it goes; written whole or not at all.
        changed: fields of ``SETTINGS`` that differ.
    """
    if str(ZOO_SCRIPTS) not in sys.path:
        sys.path.append(str(ZOO_SCRIPTS))
    from loras import Lora
    from train_loras import attach, save, train
    from transformers import PreTrainedTokenizerFast

    started = time.time()
    lora = Lora(label(task), task.name, **(SETTINGS | changed))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(zoo.base_path())
    model = attach(zoo.base_path(), lora)
    rows = [(lora.name, row["input"], row["target"]) for row in task.sample(ROWS, lora.seed, "train")]
    loss = train(lora, model, tokenizer, rows, False)
    seconds = round(time.time() - started, 1)
    save(model, folder, {"steps": lora.steps, "seconds": seconds, "final_loss": round(loss, 4)})
    return loss


def ready(count: int, folder: Path) -> dict[str, Path]:
    """The LoRAs of the first ``count`` variants by name; those that are missing in ``folder`` are trained."""
    places = {label(task): (task, folder / label(task)) for task in variants(count)}
    missing = [(task, place) for task, place in places.values() if not place.exists()]
    for task, place in tqdm(missing, desc="LoRAs", mininterval=10, disable=not missing):
        train_variant(task, place)
    return {name: place for name, (_, place) in places.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=111, help="how many variants (with the 17 bundled LoRAs, 128)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ready(options.count, options.out)


if __name__ == "__main__":
    main()
