"""Tokens for training and for generation: the same prompt, the answer's labels alone, padding that is ignored."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example
from loraweave.text import Collator, encode_example, encode_prompt, pad_token_id

EXAMPLE = Example("Grüße: a b", "ja, ö")


def ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_encoder_decoder(t5_tokenizer: Any) -> None:
    row = encode_example(t5_tokenizer, EXAMPLE, is_encoder_decoder=True)
    assert row["input_ids"] == [*ids("Grüße: a b", t5_tokenizer), 1]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert row["labels"] == [*ids("ja, ö", t5_tokenizer), 1]


def test_decoder_only_learns_the_answer_alone(llama_tokenizer: Any) -> None:
    row = encode_example(llama_tokenizer, EXAMPLE, is_encoder_decoder=False)
    prompt, answer = [2, *ids("Grüße: a b\n", llama_tokenizer)], [*ids("ja, ö", llama_tokenizer), 1]
    assert row == {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
    }
    assert encode_prompt(llama_tokenizer, EXAMPLE.input, is_encoder_decoder=False)["input_ids"] == prompt
    other = encode_example(llama_tokenizer, EXAMPLE, is_encoder_decoder=False, separator=" => ")
    assert llama_tokenizer.decode(other["input_ids"], skip_special_tokens=True) == "Grüße: a b => ja, ö"


@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A </s>"])
def test_one_end_token_whatever_the_tokenizer_adds(template: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template, bos_token="<s>", eos_token="</s>")
    causal = encode_example(tokenizer, EXAMPLE, is_encoder_decoder=False)
    assert causal["input_ids"].count(1) == 1
    assert causal["input_ids"][-1] == causal["labels"][-1] == 1
    assert causal["labels"].count(2) == 0
    labels = encode_example(tokenizer, EXAMPLE, is_encoder_decoder=True)["labels"]
    assert labels.count(1) == 1
    assert labels[-1] == 1


def test_empty_answer_is_the_end_token(t5_tokenizer: Any, llama_tokenizer: Any) -> None:
    example = Example("q", "")
    assert encode_example(t5_tokenizer, example, is_encoder_decoder=True)["labels"] == [1]
    row = encode_example(llama_tokenizer, example, is_encoder_decoder=False)
    assert [label for label in row["labels"] if label != -100] == [1]


def test_cutting_keeps_what_matters(t5_tokenizer: Any, llama_tokenizer: Any) -> None:
    example = Example("0123456789", "abcdef")
    row = encode_example(t5_tokenizer, example, is_encoder_decoder=True, max_input_length=5, max_target_length=3)
    assert t5_tokenizer.decode(row["input_ids"]) == "0123</s>"
    assert t5_tokenizer.decode(row["labels"]) == "ab</s>"
    row = encode_example(llama_tokenizer, example, is_encoder_decoder=False, max_input_length=5, max_target_length=3)
    assert llama_tokenizer.decode(row["input_ids"]) == "<s>789\nab</s>"
    assert row["labels"][:5] == [-100] * 5
    assert len(row["labels"]) == len(row["input_ids"]) == len(row["attention_mask"]) == 8
    whole = encode_example(t5_tokenizer, example, is_encoder_decoder=True, max_input_length=11, max_target_length=7)
    assert whole == encode_example(t5_tokenizer, example, is_encoder_decoder=True)


def test_bad_lengths_and_tokenizers(t5_tokenizer: Any, make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(LoraweaveError, match="max_input_length: expected at least 1 token"):
        encode_prompt(t5_tokenizer, "abc", is_encoder_decoder=True, max_input_length=0)
    with pytest.raises(LoraweaveError, match="max_input_length: 1 leaves no room"):
        encode_prompt(t5_tokenizer, "abc", is_encoder_decoder=True, max_input_length=1)
    with pytest.raises(LoraweaveError, match="max_target_length"):
        encode_example(t5_tokenizer, EXAMPLE, is_encoder_decoder=True, max_target_length=0)
    endless = make_tokenizer("$A", unk_token="<unk>")
    with pytest.raises(LoraweaveError, match="no end token"):
        encode_example(endless, EXAMPLE, is_encoder_decoder=False)
    with pytest.raises(LoraweaveError, match="neither a pad nor an end token"):
        pad_token_id(endless)


def test_pad_token(t5_tokenizer: Any, llama_tokenizer: Any) -> None:
    assert pad_token_id(t5_tokenizer) == 0
    assert pad_token_id(llama_tokenizer) == 1
    assert llama_tokenizer.pad_token is None


def test_collator_pads_right_for_training(t5_tokenizer: Any) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8]},
        {"input_ids": [9], "attention_mask": [1], "labels": [4, 1]},
    ]
    batch = Collator(t5_tokenizer)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, -100], [4, 1]],
    }
    assert all(value.dtype == torch.long for value in batch.values())
    wide = Collator(t5_tokenizer, multiple=4)(rows)
    assert wide["input_ids"].shape == wide["labels"].shape == (2, 4)


def test_collator_pads_left_for_generation(llama_tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [9], "attention_mask": [1]}]
    batch = Collator(llama_tokenizer, padding_side="left")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "labels" not in batch


def test_collator_travels_to_workers(t5_tokenizer: Any) -> None:
    rows = [{"input_ids": [5], "attention_mask": [1], "labels": [8]}]
    again = pickle.loads(pickle.dumps(Collator(t5_tokenizer, multiple=2)))
    assert again(rows)["input_ids"].tolist() == [[5, 0]]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_padding_does_not_change_the_loss(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_tokenizer")
    examples = [Example("short", "a"), Example("a much longer input", "and a longer answer")]
    encoded = [encode_example(tokenizer, example, is_encoder_decoder=kind == "t5") for example in examples]
    collate = Collator(tokenizer)
    with torch.no_grad():
        together = model(**collate(encoded)).loss
        apart = [model(**collate([row])).loss for row in encoded]
    counts = [sum(label != -100 for label in row["labels"]) for row in encoded]
    mean = sum(loss * count for loss, count in zip(apart, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, mean)
