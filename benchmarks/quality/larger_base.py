"""Trains the larger base of the benchmark, in four languages, from nothing; its tokenizer too. Not for redistribution.

    python benchmarks/quality/larger_base.py --data DATA --minutes 60 --out out/quality/larger/base

Twice the bundled base, on more: captions in English, German, French and Czech, translation into English, stories, and
the bundled base's own rows. No task of a LoRA or of a target of ``larger.py`` is among them. It runs for a number of
minutes, checkpoints under ``--work``, and goes on from there when started again (``scripts/zoo/train_base.py``).
"""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "zoo"))

import mix
import train_base
from mix import Row

SETTINGS = train_base.Settings(
    vocab_size=8192,
    d_model=256,
    d_kv=32,
    num_heads=8,
    d_ff=640,
    num_layers=4,
    num_decoder_layers=4,
    warmup_steps=100,
    checkpoint_minutes=5.0,
)
LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Czech": "cs"}
TAUGHT = {
    "multi30k/de-en": 16,
    "multi30k/fr-en": 14,
    "multi30k/cs-en": 7,
    "commongen": 4,
    "snli": 2,
    "hans_regen": 1,
    "trec": 1,
    "cola": 1,
    "nq_open": 1,
    "webquestions": 1,
}
"""The sets it learns from, in parts of a hundred."""

FILLED = {"English": 6, "German": 10, "French": 10, "Czech": 2}
"""Sentences to write from their own words, likewise; the rest is what the bundled base learns from."""

STORIES = ("commongen_train_sentences", "simplebooks_test", "simplebooks_valid", "wonderland")


def _lines(data: Path, name: str) -> list[str]:
    with gzip.open(data / "pretrain_text" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if 4 <= len(line.split()) <= 24]


def sentences(data: Path) -> dict[str, list[str]]:
    """Sentences by language: captions, and in English stories too."""
    found = {language: _lines(data, f"captions.{code}") for language, code in LANGUAGES.items()}
    found["English"] += [line for name in STORIES for line in _lines(data, name)]
    return found


def text(data: Path) -> Iterator[str]:
    """Text the tokenizer is trained on: that of the bundled base, captions, and inputs with many names."""
    yield from mix.tokenizer_text(data)
    for lines in sentences(data).values():
        yield from random.Random(0).sample(lines, min(20_000, len(lines)))
    for name in ("webnlg", "sst2", "ag_news_testpart"):
        for row in mix.read_jsonl(data / name / "train.jsonl")[:6000]:
            yield row["input"]
            yield row["target"]


def fill_row(rng: random.Random, language: str, lines: list[str]) -> Row:
    """A sentence to write from its longer words, in order."""
    while True:
        line = rng.choice(lines)
        kept = mix.content_words(line)
        if 2 <= len(kept) <= 12:
            return f"fill {language}", f"fill in {language}: {' '.join(kept)}", line


def stream(data: Path, seed: str, vocabulary: list[str]) -> Iterator[Row]:
    """Endless rows of everything, well mixed."""
    rng = random.Random(f"larger|{seed}")
    lines, bundled = sentences(data), mix.stream(data, seed, vocabulary)
    taught = {
        name: [(name, row["input"], row["target"]) for row in mix.read_jsonl(data / name / "train.jsonl")]
        for name in TAUGHT
    }
    shares = {**TAUGHT, **FILLED, "bundled": 100 - sum(TAUGHT.values()) - sum(FILLED.values())}
    while True:
        name = rng.choices(tuple(shares), tuple(shares.values()))[0]
        if name in taught:
            yield rng.choice(taught[name])
        else:
            yield fill_row(rng, name, lines[name]) if name in lines else next(bundled)


def validation(data: Path, seed: int, vocabulary: list[str]) -> list[Row]:
    """A few held-out rows of every group."""
    rng = random.Random(f"larger-validation|{seed}")
    rows = rng.sample(mix.validation_rows(data, seed, vocabulary), 200)
    for name in TAUGHT:
        held_out = rng.sample(mix.read_jsonl(data / name / "validation.jsonl"), 40)
        rows += [(name, row["input"], row["target"]) for row in held_out]
    return rows


CORPUS = train_base.Corpus(text, stream, validation)


if __name__ == "__main__":
    place = Path("out/quality/larger")
    train_base.run(train_base.parser(__doc__, 60.0, place / "base-work", place / "base").parse_args(), SETTINGS, CORPUS)
