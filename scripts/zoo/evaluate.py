"""Scores the bundled LoRAs and the bare base on held-out items; writes ``card.json`` and ``CARD.md``.

python scripts/zoo/evaluate.py --data ../shared/data
python scripts/zoo/evaluate.py --data ../shared/data --only hotel    # keeps the other entries of the card
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from card import write_card
from loras import LORAS, Lora
from mix import draw, read_jsonl
from peft import PeftModel
from settings import BASE_DIR, LORA_DIR, ZOO
from tqdm import tqdm
from train_loras import RECORD
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from loraweave.evaluation.metrics import get_metric

GENERATED_ITEMS = 200
REAL_ITEMS = 400
NEW_TOKENS = {True: 28, False: 64}  # by whether the task is generated
BATCH = 64
SEED = 1234


def items(lora: Lora, data: Path, n: int | None = None) -> list[dict[str, Any]]:
    """Held-out rows: drawn from the test split, or the first ones of the test file."""
    if lora.generated:
        return draw(lora.data, n or GENERATED_ITEMS, SEED, "test")  # type: ignore[return-value]
    rows = read_jsonl(data / lora.data.removeprefix("data:") / "test.jsonl")
    step = max(1, len(rows) // (n or REAL_ITEMS))  # spread over the file, which may be sorted
    return rows[::step][: n or REAL_ITEMS]


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str], new_tokens: int) -> list[str]:
    """Greedy answers, in the order of ``texts``; batches hold inputs of about one length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [""] * len(texts)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        inputs = tokenizer([texts[i] for i in some], padding=True, return_tensors="pt")
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        for i, text in zip(some, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            found[i] = text.strip()
    return found


def measure(
    lora: Lora, model: PeftModel, tokenizer: PreTrainedTokenizerFast, data: Path, n: int | None = None
) -> dict[str, Any]:
    """Scores of the bare base and of the LoRA on the same items, 0 to 100."""
    rows = items(lora, data, n)
    texts = [row["input"] for row in rows]
    references = [row.get("references") or [row["target"]] for row in rows]
    metric = get_metric(lora.metric)
    skilled = answers(model, tokenizer, texts, NEW_TOKENS[lora.generated])
    with model.disable_adapter():
        bare = answers(model, tokenizer, texts, NEW_TOKENS[lora.generated])
    for i in (0, len(rows) // 2):
        tqdm.write(f"  {texts[i]}\n    right {references[i][0]!r}\n    lora  {skilled[i]!r}\n    base  {bare[i]!r}")
    return {
        "metric": lora.metric,
        "base": round(metric(bare, references), 1),
        "lora": round(metric(skilled, references), 1),
        "floor": lora.floor,
        "n_test": len(rows),
    }


def entry(lora: Lora, scores: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What the card says about a LoRA."""
    return {
        "data": lora.data,
        **scores,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rslora": lora.rslora,
        "rank_pattern": lora.rank_pattern,
        "targets": list(lora.targets),
        "source": lora.source,
        "licence": lora.licence,
        "seed": lora.seed,
        **record,
    }


def main() -> None:
    """Scores what is there and writes both cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--base", type=Path, default=BASE_DIR)
    parser.add_argument("--loras", type=Path, default=LORA_DIR)
    parser.add_argument("--only", nargs="+", choices=[lora.name for lora in LORAS])
    parser.add_argument("--items", type=int, help="how many test items instead of the usual number")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder of card.json and CARD.md")
    args = parser.parse_args()
    card_path = args.out / "card.json"
    known = json.loads(card_path.read_text())["loras"] if card_path.exists() else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.base)
    entries: dict[str, Any] = {}
    for lora in tqdm([lora for lora in LORAS if (args.loras / lora.name).exists()], mininterval=5):
        if args.only and lora.name not in args.only:
            if lora.name in known:
                entries[lora.name] = known[lora.name]
            continue
        model = T5ForConditionalGeneration.from_pretrained(args.base, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(model, args.loras / lora.name).eval()
        scores = measure(lora, tuned, tokenizer, args.data, args.items)
        record = json.loads((args.loras / lora.name / RECORD).read_text())
        entries[lora.name] = entry(lora, scores, record)
        tqdm.write(f"{lora.name}: base {scores['base']} lora {scores['lora']} floor {scores['floor']}")
    write_card(args.out, args.base, entries)


if __name__ == "__main__":
    main()
