"""A tiny world on disk: a T5 with random weights, two LoRAs that peft trained and saved, data, and a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = ["<pad>", "</s>", "<unk>", "say", "colour", "size", "pear", "fig", "plum", "nut", "red", "large"]
ANSWERS = {"colour": "red", "size": "large"}
FRUITS = ("pear", "fig", "plum", "nut")

RECIPE = """\
base: base
experts: {colour: loras/colour, size: loras/size}
method: {name: mole}
data:
  tasks:
    colour: {train: colour.jsonl, test: colour.jsonl}
    size: {train: size.jsonl, test: size.jsonl}
train: {steps: 3, batch_size: 4, learning_rate: 1e-2}
generation: {max_new_tokens: 3}
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; tests read it and write elsewhere."""
    place = tmp_path_factory.mktemp("world")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(place / "base")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes))
    model.save_pretrained(place / "base")
    for task, answer in ANSWERS.items():
        rows = [{"input": f"say {task} {a} {b}", "target": answer} for a in FRUITS for b in FRUITS]
        (place / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _train_lora(place / "base", tokenizer, rows, place / "loras" / task)
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def recipe(world: Path) -> Path:
    return world / "recipe.yaml"


@pytest.fixture(scope="session")
def mixture(world: Path) -> Path:
    """A saved mixture with trained gates, and its experts beside it."""
    from loraweave.cli import main

    place = world / "mixture"
    assert main(["train", str(world / "recipe.yaml"), "-o", str(place), "--copy-experts"]) == 0
    return place


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _train_lora(base: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], out: Path) -> None:
    """A LoRA that always gives the one answer of its task."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(T5ForConditionalGeneration.from_pretrained(base), settings)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    batch = tokenizer([row["input"] for row in rows], return_tensors="pt", padding=True)
    labels = tokenizer([row["target"] for row in rows], return_tensors="pt").input_ids
    for _ in range(30):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.save_pretrained(out)
