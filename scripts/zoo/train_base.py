"""Trains the tokenizer and the base model of the bundled zoo, from nothing.

    python scripts/zoo/train_base.py --data ../shared/data --minutes 12 --work out/zoo-base

Runs for a number of minutes (the cosine follows the clock), writes a checkpoint every few of them under ``--work``, and
goes on from the last one when started again. The finished model is rounded to fp16 and put into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mix import SENTINELS, Row, stream, tokenizer_text, validation_rows
from settings import BASE_DIR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

NEIGHBOUR = 4.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the base besides its data."""

    vocab_size: int = 4096
    d_model: int = 192
    d_kv: int = 32
    num_heads: int = 6
    d_ff: int = 512
    num_layers: int = 4
    num_decoder_layers: int = 3
    learning_rate: float = 2e-3
    bias_factor: float = 20.0  # position biases must move by several units, other weights by a tenth of one
    bias_start: float = 5.0  # see point_heads
    warmup_steps: int = 40
    batch_rows: int = 128  # of all families together: batches of one family at a time teach much more slowly
    seed: int = 0
    bf16: bool = True
    checkpoint_minutes: float = 2.0
    log_steps: int = 50


def make_tokenizer(data: Path, settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is its own token."""
    specials = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(data), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=specials[3:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(settings: Settings) -> T5ForConditionalGeneration:
    """A fresh T5 with gated GELU and tied embeddings."""
    torch.manual_seed(settings.seed)
    shape = {k: v for k, v in asdict(settings).items() if k.startswith(("vocab", "d_", "num_"))}
    config = T5Config(
        **shape,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # One head starts out looking at the word before, one at the word after: copying in order needs it, and finding
        # it by chance takes a small model longer than all of this training.
        encoder, decoder = (stack.block[0].layer[0].SelfAttention for stack in (model.encoder, model.decoder))
        after = encoder.relative_attention_num_buckets // 2 + 1
        encoder.relative_attention_bias.weight[1, 0] += NEIGHBOUR
        encoder.relative_attention_bias.weight[after, 1] += NEIGHBOUR
        decoder.relative_attention_bias.weight[1, 0] += NEIGHBOUR
    return model


Encoded = list[tuple[str, list[int], list[int]]]
"""Rows as group, source ids and target ids."""


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> Encoded:
    """The ids of every row, cut to 96 and 64."""
    sources = tokenizer([row[1] for row in rows])["input_ids"]
    targets = tokenizer([row[2] for row in rows])["input_ids"]
    return [(row[0], s[:96], t[:64]) for row, s, t in zip(rows, sources, targets, strict=True)]


def batches(rows: Encoded, tokens: int, rng: random.Random) -> Iterator[Encoded]:
    """Batches of rows of about one length, endless, in random order."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), 8192):
            chunk = sorted(order[start : start + 8192], key=lambda i: (len(rows[i][1]), len(rows[i][2])))
            made: list[list[tuple[str, list[int], list[int]]]] = [[]]
            longest = [0, 0]
            for i in chunk:
                longest = [max(longest[0], len(rows[i][1])), max(longest[1], len(rows[i][2]))]
                if made[-1] and sum(longest) * (len(made[-1]) + 1) > tokens:
                    made.append([])
                    longest = [len(rows[i][1]), len(rows[i][2])]
                made[-1].append(rows[i])
            rng.shuffle(made)
            yield from made


def tensors(batch: Encoded) -> dict[str, torch.Tensor]:
    """Padded ``input_ids``, ``attention_mask`` and ``labels`` (-100 at padding), each (rows, length)."""
    wide, long = max(len(row[1]) for row in batch), max(len(row[2]) for row in batch)
    ids = torch.tensor([row[1] + [0] * (wide - len(row[1])) for row in batch])
    labels = torch.tensor([row[2] + [-100] * (long - len(row[2])) for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@torch.no_grad()
def validate(model: T5ForConditionalGeneration, rows: Encoded) -> dict[str, tuple[float, float]]:
    """Loss a token, and share of rows whose every token is right under teacher forcing, for every group."""
    model.eval()
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for start in range(0, len(rows), 128):
        batch = rows[start : start + 128]
        inputs = tensors(batch)
        logits = model(**inputs).logits.float()
        labels = inputs["labels"]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = ((logits.argmax(-1) == labels) | (labels < 0)).all(1)
        for row, loss, ok in zip(batch, losses.sum(1) / (labels >= 0).sum(1), right, strict=True):
            found[row[0]].append((loss.item(), float(ok)))
    model.train()
    return {k: (sum(a for a, _ in v) / len(v), sum(b for _, b in v) / len(v)) for k, v in sorted(found.items())}


def export(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves the weights as fp16, and the tokenizer."""
    copy = T5ForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of every token that is whole characters."""
    found = [tokenizer.decode([i]) for i in range(3 + SENTINELS, len(tokenizer))]
    return [piece for piece in found if "\ufffd" not in piece]


def main() -> None:
    """Prepares the tokenizer, then trains until the clock says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--work", type=Path, default=Path("out/zoo-base"), help="folder of checkpoints and the log")
    parser.add_argument("--out", type=Path, default=BASE_DIR, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time in all, over restarts")
    args = parser.parse_args()
    settings = Settings()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "tokenizer").exists():
        make_tokenizer(args.data, settings).save_pretrained(args.work / "tokenizer")
    train(args, settings, PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer"))


def train(args: argparse.Namespace, settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = encode(tokenizer, validation_rows(args.data, settings.seed, pieces(tokenizer)))
    model = make_model(settings).train()
    biases = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
    apart = {id(p) for p in biases}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in apart], "factor": 1.0},
        {"params": biases, "factor": settings.bias_factor, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, spent, state_path = 0, 0.0, args.work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rows = stream(args.data, f"{settings.seed}|{step}", pieces(tokenizer), settings.batch_rows)
    budget, began, saved, total = args.minutes * 60, time.time() - spent, spent, 0.0
    bar = tqdm(total=int(budget), initial=int(spent), unit="s", mininterval=10)
    while spent < budget:
        inputs = tensors(encode(tokenizer, next(rows)))
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
        rate *= max(0.02, 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, spent, total = step + 1, time.time() - began, total + loss.item()
        if step % settings.log_steps == 0:
            print(f" step {step} {spent:.0f} s loss {total / settings.log_steps:.3f}", flush=True)
            total = 0.0
        bar.update(int(spent) - bar.n)
        if spent - saved > settings.checkpoint_minutes * 60 or spent >= budget:
            saved = spent
            checks = validate(model, held_out)
            print(" ".join(f"{k} {a:.2f}/{b:.2f}" for k, (a, b) in checks.items()), flush=True)
            with (args.work / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "seconds": round(spent), "validation": checks}) + "\n")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            export(model, tokenizer, args.work / "latest")
    export(model, tokenizer, args.out)
    record = {"parameters": model.num_parameters(), "steps": step, "seconds": round(spent), "seed": settings.seed}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"done: {step} steps in {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
