"""The two cards of the zoo: ``card.json`` for programs, ``CARD.md`` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mix import base_tasks
from settings import BASE_NAME, HELD_OUT

from loraweave.zoo import tasks

_SOURCES = {
    "base": "e-SNLI, part of its development set | CC BY-SA 4.0 (copy: MIT) | Bowman et al. 2015; Camburu et al. 2018",
    "e2e": "E2E NLG Challenge | CC BY-SA 4.0 | Novikova et al. 2017, tuetschek/e2e-dataset",
    "hotel": "RNNLG | Apache-2.0 | Wen et al. 2015, shawnwun/RNNLG",
    "restaurant": "RNNLG | Apache-2.0 | Wen et al. 2015, shawnwun/RNNLG",
    "tv": "RNNLG | Apache-2.0 | Wen et al. 2015, shawnwun/RNNLG",
}


def _licences(names: list[str]) -> str:
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in _SOURCES.items() if name == "base" or name in names)
    return f"""\
## Sources and licences

The package's own rows, and the code, are Apache-2.0. Weights derived from a data set carry that set's terms as well.

| what | trained on, besides generated rows | licence | attribution |
|---|---|---|---|
{rows}

The tokenizer's merges were counted on generated rows and on training text of SNLI, E2E (CC BY-SA 4.0), RNNLG
(Apache-2.0), HANS (MIT), CommonGen (MIT) and Alice's Adventures in Wonderland (public domain). No data row is part of
the package.
"""


def _shape(entry: dict[str, Any]) -> str:
    extra = ", rsLoRA" if entry["rslora"] else ""
    extra += ", rank pattern" if entry["rank_pattern"] else ""
    return f"r {entry['rank']}, alpha {entry['alpha']:g}{extra}; {' '.join(entry['targets'])}"


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 2)


def _row(name: str, entry: dict[str, Any]) -> str:
    floor = f"{entry['floor']:g}" if entry["floor"] else "-"
    cells = [
        f"`{name}`",
        entry["data"].removeprefix("data:"),
        entry["metric"],
        f"{entry['base']:.1f}",
        f"**{entry['lora']:.1f}**",
        floor,
        str(entry["n_test"]),
        _shape(entry),
        f"{entry['steps']:g} / {entry['seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def _markdown(card: dict[str, Any]) -> str:
    base = card["base"]
    table = "\n".join(_row(name, entry) for name, entry in card["loras"].items())
    return f"""# The bundled zoo

One small T5-style model, `{BASE_NAME}`, trained from nothing, and {len(card["loras"])} LoRAs for it. They serve demos
and tests: real enough to interfere when summed, small enough for a laptop. **Not** for any other use.

This file is written by `scripts/zoo/evaluate.py` from the same figures as `card.json`.

## LoRAs

Scores are 0 to 100 on held-out items with greedy decoding; *base* is the bare model on the same items, *floor* what a
trivial method reaches on a real set's whole test file (given where there is one).

| LoRA | task or set | metric | base | LoRA | floor | items | shape | steps / time |
|---|---|---|---|---|---|---|---|---|
{table}

Each was trained with AdamW, a cosine schedule, on the base's rounded weights (`scripts/zoo/train_loras.py`, seed 0, one
CPU thread); where rank pattern is given, see `card.json`. Saved in fp16 as ordinary PEFT folders.

## Base

{base["parameters"] / 1e6:.2f} M parameters: {base["shape"]}. Trained for {base["seconds"] / 60:.0f} minutes
({base["steps"]} steps) on 2 CPU cores (`scripts/zoo/train_base.py`) on {base["tasks"]} generated tasks (four
rows in five), copying of random tokens and made-up records, SNLI, and sentences to write from their longer words
(SNLI's, and Alice's Adventures in Wonderland). It never saw the tasks of the LoRAs, nor these, which nothing here is
trained on:
{", ".join(f"`{name}`" for name in HELD_OUT)}.
RNNLG's laptop domain is kept out of everything in the same way.

{_licences(list(card["loras"]))}"""


def write_card(folder: Path, base: Path, entries: dict[str, Any]) -> None:
    """Writes both cards into ``folder``.

    Args:
        folder: of ``card.json`` and ``CARD.md``.
        base: folder of the base model; its ``training.json`` gives steps and seconds.
        entries: what is known about each LoRA, in order.
    """
    config = json.loads((base / "config.json").read_text())
    keys = ("d_model", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "vocab_size")
    card = {
        "base": {
            "name": BASE_NAME,
            "shape": ", ".join(f"{key} {config[key]}" for key in keys),
            "tasks": len(base_tasks()),
            "megabytes": _megabytes(base),
            **json.loads((base / "training.json").read_text()),
        },
        "generated_tasks": len(tasks.names()),
        "held_out": list(HELD_OUT),
        "loras": entries,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "CARD.md").write_text(_markdown(card), encoding="utf-8")
