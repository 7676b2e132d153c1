"""The base model's training rows: generated tasks, copying of made-up names, and SNLI."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from settings import HELD_OUT, SKILLS

from loraweave.zoo import tasks

WALKING = frozenset(
    {"arrange", "relate", "letters", "reorder", "sort", "number_words", "cipher", "translate", "sets", "pick"}
    | {"lookup", "sequence", "record"}
)  # fmt: skip
SENTINELS = 20
_SYLLABLES = [
    c + v for c in ("b", "k", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t", "v", "z", "th") for v in "aeiou"
]

Row = tuple[str, str, str]
"""Group (for the log), input, target."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, or of the same file packed as ``.gz``."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def base_tasks() -> list[str]:
    """Generated tasks that are neither skills nor held out."""
    return [name for name in tasks.names() if name not in SKILLS and name not in HELD_OUT]


def draw(name: str, n: int, seed: int, split: tasks.Split) -> list[dict[str, str]]:
    """``n`` rows of a generated task; a small task gives what it has, by halving until it suffices."""
    while True:
        try:
            return tasks.get(name).sample(n, seed, split)
        except ValueError:
            n //= 2


def task_rows(n: int, seed: int, split: tasks.Split) -> list[Row]:
    """Rows of every base task; small tasks are repeated up to four times."""
    rows: list[Row] = []
    for name in base_tasks():
        found = [(tasks.get(name).family, row["input"], row["target"]) for row in draw(name, n, seed, split)]
        rows += (found * 4)[: max(n, len(found))] if split == "train" else found
    return rows


def made_name(rng: random.Random) -> str:
    """One or two made words, at times capitalised or with a number, e.g. ``zabo thir 36``."""
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.3:
        words.append(str(rng.randint(0, 999)))
    name = " ".join(words)
    return name.title() if rng.random() < 0.3 else name


def slot_row(rng: random.Random) -> Row:
    """A made record in one of two notations; asked for one field or for all, so that copying is learnt by position."""
    size = rng.choice((1, 1, 2, 3))
    keys = rng.sample(_SYLLABLES, size)
    keys = [key + rng.choice(_SYLLABLES) for key in keys]
    values = [made_name(rng) for _ in keys]
    if rng.random() < 0.5:
        record = ", ".join(f"{key}[{value}]" for key, value in zip(keys, values, strict=True))
    else:
        quote = "'" if rng.random() < 0.5 else ""
        inner = ";".join(f"{key}={quote}{value}{quote}" for key, value in zip(keys, values, strict=True))
        record = f"{rng.choice(_SYLLABLES)}({inner})"
    if rng.random() < 0.5:
        at = rng.randrange(size)
        return "slots", f"slot {keys[at]}: {record}", values[at]
    return "slots", f"say slots: {record}", " , ".join(f"{k} is {v}" for k, v in zip(keys, values, strict=True))


def copy_row(rng: random.Random, vocabulary: list[str]) -> Row:
    """One to six random tokens to copy, so that every embedding is trained both ways; short ones teach it faster."""
    text = "".join(rng.choices(vocabulary, k=rng.choice((1, 1, 2, 2, 3, 4, 6)))).strip()
    return "copy", f"copy: {text}", text


def plain_text(data: Path) -> list[str]:
    """CommonGen's training sentences (MIT) and wonderland (public domain): all that may train shipped weights."""
    lines: list[str] = []
    for name in ("commongen_train_sentences.txt.gz", "wonderland.txt.gz"):
        with gzip.open(data / "pretrain_text" / name, "rt", encoding="utf-8") as file:
            lines += [line.strip() for line in file if len(line.split()) >= 4]
    return lines


def tokenizer_text(data: Path) -> Iterator[str]:
    """Text the tokenizer is trained on: the mix, and the training inputs and targets of the LoRAs' sets."""
    for name in tasks.names():
        for row in draw(name, 150, 0, "train"):
            yield row["input"]
            yield row["target"]
    yield from plain_text(data)
    for name in ("snli", "e2e", "rnnlg/restaurant", "rnnlg/hotel", "rnnlg/tv"):
        for row in read_jsonl(data / name / "train.jsonl")[:6000]:
            yield row["input"]
            yield row["target"]
    for row in read_jsonl(data / "hans_regen" / "train.jsonl")[:3000]:
        yield row["input"]


def sentences(data: Path) -> list[str]:
    """English sentences that may train shipped weights: SNLI's, with their explanations, and wonderland."""
    found: dict[str, None] = {}
    for row in read_jsonl(data / "snli" / "train.jsonl"):
        found.update(dict.fromkeys((row["premise"], row["hypothesis"], row["explanation"])))
    with gzip.open(data / "pretrain_text" / "wonderland.txt.gz", "rt", encoding="utf-8") as file:
        found.update(dict.fromkeys(line.strip() for line in file))
    return [line for line in found if 5 <= len(line.split()) <= 24]


def fill_row(rng: random.Random, lines: list[str]) -> Row:
    """A sentence to write from its words of four letters and more, in order: teaches the small words of English."""
    while True:
        line = rng.choice(lines)
        kept = content_words(line)
        if 2 <= len(kept) <= 10:
            return "fill", f"fill in: {' '.join(kept)}", line


def content_words(line: str) -> list[str]:
    """Its words of four letters and more, in order."""
    return [word for word in line.lower().replace(".", "").replace(",", "").split() if len(word) > 3]


def stream(data: Path, seed: str, vocabulary: list[str]) -> Iterator[Row]:
    """Endless rows of everything, well mixed; families that walk along their input are drawn twice as often."""
    rng = random.Random(f"mix|{seed}")
    nli = [("snli", row["input"], row["target"]) for row in read_jsonl(data / "snli" / "train.jsonl")]
    lines = sentences(data)
    chosen = [tasks.get(name) for name in base_tasks()]
    weights = list(itertools.accumulate(2 if task.family in WALKING else 1 for task in chosen))
    makers = {
        "task": lambda: _task_row(rng.choices(chosen, cum_weights=weights)[0], rng),
        "slots": lambda: slot_row(rng),
        "copy": lambda: copy_row(rng, vocabulary),
        "fill": lambda: fill_row(rng, lines),
        "snli": lambda: rng.choice(nli),
    }
    shares = (78, 9, 4, 6, 3)
    while True:
        yield makers[rng.choices(tuple(makers), shares)[0]]()


def _task_row(task: tasks.Task, rng: random.Random) -> Row:
    while True:
        body, target = task.draw(rng)
        text = f"{task.phrase}: {body}"
        if tasks.split_of(text) == "train":
            return task.family, text, target


def validation_rows(data: Path, seed: int, vocabulary: list[str]) -> list[Row]:
    """A few held-out rows of every group."""
    rng = random.Random(f"mix-validation|{seed}")
    rows = task_rows(6, seed, "validation")
    rows += [slot_row(rng) for _ in range(60)] + [copy_row(rng, vocabulary) for _ in range(60)]
    held_out = read_jsonl(data / "snli" / "validation.jsonl")
    rows += [("snli", row["input"], row["target"]) for row in held_out[:60]]
    rows += [fill_row(rng, [row["premise"] for row in held_out]) for _ in range(60)]
    return rows
