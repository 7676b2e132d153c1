"""Trains the tokenizer and the base model of the bundled zoo, from nothing.

    python scripts/zoo/train_base.py --data ../shared/data --minutes 12 --work out/zoo-base

Runs for a number of minutes (the cosine follows the clock), writes a checkpoint every few of them under ``--work``, and
goes on from the last one when started again. The finished model is rounded to fp16 and put into the package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mix import SENTINELS, Row, stream, tokenizer_text, validation_rows
from settings import BASE_DIR
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration


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
    neighbour: float = 5.0  # see teach_copying for this and the next three
    write: float = 2.0
    match: float = 0.5
    copy: float = 4.0
    warmup_steps: int = 40
    batch_rows: int = 64  # a worker's; of all families together: batches of one family teach much more slowly
    pool_batches: int = 16  # batches cut from one pool of rows sorted by length, which saves most of the padding
    average_steps: int = 8  # the workers' weights are averaged so often
    seed: int = 0
    bf16: bool = True
    checkpoint_minutes: float = 2.5
    log_steps: int = 50


@dataclass(frozen=True)
class Corpus:
    """What a base learns from. Its functions have names of their own, since they travel to the workers.

    Attributes:
        text: from the data's folder, what the tokenizer is trained on.
        stream: from the folder, a seed and the texts of the tokens, endless training rows.
        validation: from the same, a few held-out rows of every group.
    """

    text: Callable[[Path], Iterator[str]]
    stream: Callable[[Path, str, list[str]], Iterator[Row]]
    validation: Callable[[Path, int, list[str]], list[Row]]


ZOO_CORPUS = Corpus(tokenizer_text, stream, validation_rows)


def make_tokenizer(text: Iterator[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is its own token."""
    specials = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    opening = ("='", "=", "[", "(")
    tokenizer.normalizer = normalizers.Sequence(  # so that a word inside brackets is the same token as in a sentence
        [normalizers.Replace(Regex(rf"{re.escape(o)}(?=[\p{{L}}\d£])"), f"{o} ") for o in opening]
        + [normalizers.Prepend(" ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+| ?[^\s\d\p{L}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    closing = [decoders.Replace(f"{o} ", o) for o in opening]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *closing, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
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
    teach_copying(model, settings)
    return model


@torch.no_grad()
def teach_copying(model: T5ForConditionalGeneration, settings: Settings) -> None:
    """Starts the model with the circuit that copies in order, which ours had not found after 18 minutes.

    T5 has no absolute positions, so the decoder walks along its input by content: "find the word that follows the one I
    have just written". Two encoder heads tell every position its left and its right neighbour (the biases of their
    relative positions point there), each in a subspace of its own; cross attention of the first decoder block matches
    the decoder's own word against these and passes on what it finds. Training is free to change all of it. In the
    spirit of mimetic initialisation (Trockman & Kolter, ICML 2023).
    """
    d, width = settings.d_kv, settings.d_model
    basis = torch.linalg.qr(torch.randn(width, width))[0].T.contiguous()
    word, left, right = basis[:d], basis[d : 2 * d], basis[2 * d : 3 * d]
    encoder, decoder = model.encoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[0].SelfAttention
    after = encoder.relative_attention_num_buckets // 2 + 1
    for head, (bucket, place) in enumerate(((1, left), (after, right))):
        rows = slice(head * d, (head + 1) * d)
        encoder.relative_attention_bias.weight[bucket, head] += settings.neighbour
        encoder.q.weight[rows] = 0
        encoder.v.weight[rows] = word
        encoder.o.weight[:, rows] = settings.write * place.T
    decoder.relative_attention_bias.weight[1, 0] += settings.neighbour
    cross = model.decoder.block[0].layer[1].EncDecAttention
    for head in range(4):  # three that walk forwards and together pass on most of a word, one that walks backwards
        rows = slice(head * d, (head + 1) * d)
        cross.q.weight[rows] = settings.match * word
        cross.k.weight[rows] = left if head < 3 else right
        if head < 3:
            passed = basis[(3 + head) * d : (4 + head) * d]
            cross.v.weight[rows] = passed
            cross.o.weight[:, rows] = settings.copy * passed.T


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


def mixed(
    rows: Iterator[Row], tokenizer: PreTrainedTokenizerFast, settings: Settings, rng: random.Random
) -> Iterator[Encoded]:
    """Endless batches of many families whose inputs are of about one length."""
    size = settings.batch_rows
    while True:
        pool = encode(tokenizer, list(itertools.islice(rows, size * settings.pool_batches)))
        pool.sort(key=lambda row: len(row[1]))
        made = [pool[at : at + size] for at in range(0, len(pool), size)]
        rng.shuffle(made)
        yield from made


def average(model: T5ForConditionalGeneration, spent: float) -> float:
    """Averages the weights over the workers; returns the first worker's clock, so that all agree on it."""
    clock = torch.tensor([spent if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([*(p.data.flatten() for p in model.parameters()), clock])
    dist.all_reduce(flat)
    at = 0
    for parameter in model.parameters():
        parameter.data.copy_(flat[at : at + parameter.numel()].view_as(parameter) / dist.get_world_size())
        at += parameter.numel()
    return flat[-1].item()


def pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of every token that is whole characters."""
    found = [tokenizer.decode([i]) for i in range(3 + SENTINELS, len(tokenizer))]
    return [piece for piece in found if "\ufffd" not in piece]


def parser(description: str | None, minutes: float, work: Path, out: Path) -> argparse.ArgumentParser:
    """The options of a training run, with these defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    made.add_argument("--work", type=Path, default=work, help="folder of checkpoints and the log")
    made.add_argument("--out", type=Path, default=out, help="folder of the finished model")
    made.add_argument("--minutes", type=float, default=minutes, help="training time in all, over restarts")
    made.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return made


def run(args: argparse.Namespace, settings: Settings, corpus: Corpus) -> None:
    """Prepares the tokenizer, then trains until the clock says so."""
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "tokenizer").exists():
        make_tokenizer(corpus.text(args.data), settings).save_pretrained(args.work / "tokenizer")
    (args.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(train, args=(args, settings, corpus), nprocs=args.workers)


def main() -> None:
    """Trains the base of the bundled zoo."""
    run(parser(__doc__, 12.0, Path("out/zoo-base"), BASE_DIR).parse_args(), Settings(), ZOO_CORPUS)


def train(rank: int, args: argparse.Namespace, settings: Settings, corpus: Corpus) -> None:
    """One worker: local SGD on its own batches with one thread. The first one logs and saves."""
    torch.set_num_threads(1)
    store = f"file://{(args.work / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    held_out = encode(tokenizer, corpus.validation(args.data, settings.seed, pieces(tokenizer)))
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
    seed = f"{settings.seed}|{step}|{rank}"
    rows = mixed(corpus.stream(args.data, seed, pieces(tokenizer)), tokenizer, settings, random.Random(seed))
    budget, began, saved, total = args.minutes * 60, time.time() - spent, spent, 0.0
    bar = tqdm(total=int(budget), initial=int(spent), unit="s", mininterval=10, disable=rank > 0)
    while spent < budget:
        inputs = tensors(next(rows))
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
        step, total = step + 1, total + loss.item()
        if step % settings.average_steps == 0:
            spent = average(model, time.time() - began)
        if rank:
            continue
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
    dist.destroy_process_group()
    if rank:
        return
    export(model, tokenizer, args.out)
    record = {"parameters": model.num_parameters(), "steps": step, "seconds": round(spent), "seed": settings.seed}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"done: {step} steps in {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
