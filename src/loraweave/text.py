"""How an example becomes tokens: one definition for training and for generation, so that they cannot drift apart.

Encoder-decoder models read ``input`` and write ``target``. Decoder-only models read ``input`` + :data:`SEPARATOR` and
continue with ``target`` and the end token; prompt and answer are tokenised apart, so that the prompt has the same
tokens whether an answer follows or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError

if TYPE_CHECKING:
    from loraweave.evaluation.data import Example

SEPARATOR = "\n"
IGNORED = -100
Encoded: TypeAlias = dict[str, list[int]]


def encode_example(
    tokenizer: Any,
    example: Example,
    *,
    is_encoder_decoder: bool,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
    separator: str = SEPARATOR,
) -> Encoded:
    """Tokens to train on.

    Args:
        tokenizer: a transformers tokenizer.
        example: what to encode; trains on ``target``, not on the other references.
        is_encoder_decoder: ``model.config.is_encoder_decoder``.
        max_input_length: most tokens of the input (:func:`encode_prompt` says what is cut); None cuts nothing.
        max_target_length: most tokens of the answer with its end token, which stays; None cuts nothing.
        separator: between input and answer, decoder-only models.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``. For decoder-only models all three cover prompt and answer, and
        the prompt's labels are -100.

    Raises:
        LoraweaveError: the tokenizer has no end token, or a maximal length is smaller than 1.
    """
    prompt = encode_prompt(
        tokenizer,
        example.input,
        is_encoder_decoder=is_encoder_decoder,
        max_input_length=max_input_length,
        separator=separator,
    )
    answer = _answer(tokenizer, example.target, is_encoder_decoder, max_target_length)
    if is_encoder_decoder:
        return {**prompt, "labels": answer}
    return {
        "input_ids": prompt["input_ids"] + answer,
        "attention_mask": prompt["attention_mask"] + [1] * len(answer),
        "labels": [IGNORED] * len(prompt["input_ids"]) + answer,
    }


def encode_prompt(
    tokenizer: Any,
    text: str,
    *,
    is_encoder_decoder: bool,
    max_input_length: int | None = None,
    separator: str = SEPARATOR,
) -> Encoded:
    """``input_ids`` and ``attention_mask`` of what the model reads before it answers.

    A text of more than ``max_input_length`` tokens loses its end in an encoder-decoder, where the task prefix stands in
    front, and its front in a decoder-only model, where the separator before the answer must stay. The tokenizer's
    special tokens around the text are kept in both cases.
    """
    _check_length("max_input_length", max_input_length)
    whole = text if is_encoder_decoder else text + separator
    ids: list[int] = list(tokenizer(whole, truncation=False, verbose=False)["input_ids"])
    if not is_encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id:
        # Some tokenizers end every text; a prompt must stay open.
        ids.pop()
    if max_input_length is not None and len(ids) > max_input_length:
        ids = _cut(tokenizer, ids, max_input_length, keep_end=not is_encoder_decoder)
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, or the end token where it has none (it is masked anyway).

    Raises:
        LoraweaveError: it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise LoraweaveError("the tokenizer has neither a pad nor an end token: set tokenizer.pad_token")


class Collator:
    """Makes one batch of encoded examples: pads ``input_ids``, ``attention_mask`` and, where there are any, ``labels``.

    Labels are padded with -100, on the same side. ``decoder_input_ids`` are left to the model.

    Args:
        tokenizer: gives the pad token; it is not changed, and its padding side is not read.
        padding_side: ``"right"`` for training and encoders, ``"left"`` for generation with a decoder-only model.
        multiple: pad lengths up to a multiple of this.
    """

    def __init__(self, tokenizer: Any, *, padding_side: Literal["right", "left"] = "right", multiple: int = 1) -> None:
        self.pad_token_id = pad_token_id(tokenizer)
        self.padding_side = padding_side
        self.multiple = multiple

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """``{name: int64 [rows, longest]}``."""
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {key: self._pad([row[key] for row in rows], fill[key]) for key in fill if key in rows[0]}

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        width = -(-longest // self.multiple) * self.multiple
        padded = torch.full((len(rows), width), value, dtype=torch.long)
        for filled, row in zip(padded, rows, strict=True):
            place = slice(width - len(row), width) if self.padding_side == "left" else slice(0, len(row))
            filled[place] = torch.tensor(list(row), dtype=torch.long)
        return padded


def _answer(tokenizer: Any, target: str, is_encoder_decoder: bool, max_length: int | None) -> list[int]:
    """The answer's tokens, with the end token last."""
    _check_length("max_target_length", max_length)
    end = tokenizer.eos_token_id
    if end is None:
        raise LoraweaveError("the tokenizer has no end token, so the model could not learn to stop: set eos_token")
    # An encoder-decoder's tokenizer knows which special tokens its targets carry; in a continuation there are none.
    encoded = tokenizer(text_target=target, add_special_tokens=is_encoder_decoder, truncation=False, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    if ids and ids[-1] == end:
        ids.pop()
    return [*(ids if max_length is None else ids[: max_length - 1]), end]


def _cut(tokenizer: Any, ids: list[int], length: int, *, keep_end: bool) -> list[int]:
    """``length`` of the ``ids``, with the special tokens around the text kept."""
    special = set(tokenizer.all_special_ids)
    front = next((n for n, token in enumerate(ids) if token not in special), len(ids))
    back = next((n for n, token in enumerate(reversed(ids)) if token not in special), len(ids))
    room = length - front - back
    if room < 1:
        raise LoraweaveError(
            f"max_input_length: {length} leaves no room for text beside {front + back} special tokens; make it larger"
        )
    text = ids[front : len(ids) - back]
    return ids[:front] + (text[-room:] if keep_end else text[:room]) + ids[len(ids) - back :]


def _check_length(name: str, length: int | None) -> None:
    if length is not None and length < 1:
        raise LoraweaveError(f"{name}: expected at least 1 token, got {length}")
