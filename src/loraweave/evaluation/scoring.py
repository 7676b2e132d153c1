"""What a model answers, in batches, and how good that is."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example
from loraweave.evaluation.metrics import Metric, get_metric
from loraweave.text import SEPARATOR, Collator, encode_prompt, pad_token_id


@dataclass(frozen=True)
class Score:
    """How a model did on a set of examples.

    Attributes:
        metric: the metric's name.
        value: the score, 0 to 100.
        n: number of examples.
        seconds: wall-clock time of generating and scoring.
        predictions: the answers, in the order of the examples.
        per_item: the score of each answer by itself, 0 to 100; for BLEU their mean is not ``value``.
    """

    metric: str
    value: float
    n: int
    seconds: float
    predictions: tuple[str, ...] = field(repr=False)
    per_item: tuple[float, ...] = field(repr=False)


def predict(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    num_beams: int = 1,
    max_input_length: int | None = None,
    separator: str = SEPARATOR,
    progress: bool = True,
    description: str = "generating",
    **generation: Any,
) -> list[str]:
    """What ``model`` answers to each of ``inputs``, in their order, without outer white space.

    Inputs of like length share a batch, so little is padded. The model runs in evaluation mode and is left in the modes
    it was in; the tokenizer is not changed. Decoding is greedy (or by beams) unless ``generation`` says otherwise,
    whatever the model's own generation settings are.

    Args:
        model: a transformers model, encoder-decoder or decoder-only, with or without a mixture on it.
        tokenizer: its tokenizer.
        inputs: plain texts; a decoder-only model reads ``input + separator``, as in training.
        max_new_tokens: longest answer.
        batch_size: inputs in one batch.
        num_beams: 1 is greedy.
        max_input_length: cut longer inputs (see :func:`loraweave.text.encode_prompt`); None: an input that is too long
            for the model is an error.
        separator: see ``inputs``.
        progress: show a bar on stderr.
        description: the bar's label.
        **generation: anything else that ``model.generate`` takes, e.g. ``do_sample=True``.

    Raises:
        LoraweaveError: a number is smaller than 1, several answers per input are asked for, or an input is too long,
            or the model cannot generate.
    """
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("num_beams", num_beams)):
        if number < 1:
            raise LoraweaveError(f"{name}: expected at least 1, got {number}")
    if isinstance(inputs, str):
        raise LoraweaveError("inputs: expected a list of texts, got one text; write [text]")
    if generation.get("num_return_sequences", 1) != 1:
        raise LoraweaveError("num_return_sequences: expected 1, because every input has one answer")
    if not hasattr(model, "generate"):
        raise LoraweaveError(
            f"expected a transformers model that generates text, got {type(model).__name__}; of a mixture, pass .model"
        )
    encoder_decoder = bool(model.config.is_encoder_decoder)
    prompts = [
        encode_prompt(
            tokenizer,
            text,
            is_encoder_decoder=encoder_decoder,
            max_input_length=max_input_length,
            separator=separator,
        )
        for text in inputs
    ]
    _check_room(model, [len(prompt["input_ids"]) for prompt in prompts], max_new_tokens)
    settings = _settings(model, tokenizer, max_new_tokens, num_beams, generation)
    collate = Collator(tokenizer, padding_side="right" if encoder_decoder else "left")
    # Longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]["input_ids"]))
    answers = [""] * len(prompts)
    with (
        evaluating(model),
        _generating(model, settings),
        # Not inference_mode: what a mixture computes here and keeps would be of no use to training afterwards.
        torch.no_grad(),
        tqdm(total=len(prompts), desc=description, unit="example", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([prompts[n] for n in chosen]).items()}
            produced = model.generate(**batch, **generation)
            new = produced if encoder_decoder else produced[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for n, text in zip(chosen, texts, strict=True):
                answers[n] = text.strip()
            bar.update(len(chosen))
    return answers


def score(
    model: Any, tokenizer: Any, examples: Sequence[Example], metric: str | Metric = "exact_match", **options: Any
) -> Score:
    """Let ``model`` answer ``examples`` and score that.

    Args:
        model: see :func:`predict`.
        tokenizer: see :func:`predict`.
        examples: at least one.
        metric: a name of :data:`loraweave.evaluation.metrics.METRICS`, or a metric.
        **options: those of :func:`predict`.

    Raises:
        LoraweaveError: unknown metric, no examples, or as :func:`predict`.
    """
    measure = get_metric(metric) if isinstance(metric, str) else metric
    if not examples:
        raise LoraweaveError("no examples to score: expected at least one")
    start = time.perf_counter()
    predictions = predict(model, tokenizer, [example.input for example in examples], **options)
    references = [example.references for example in examples]
    per_item = measure.per_item(predictions, references)
    value = measure(predictions, references)
    seconds = time.perf_counter() - start
    return Score(measure.name, value, len(examples), seconds, tuple(predictions), tuple(per_item))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode, and every module of it back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not model.train(): a frozen part may have been in evaluation mode inside a model that trains.
        for module, training in modes:
            module.training = training


@contextmanager
def _generating(model: Any, settings: Any) -> Iterator[None]:
    """Lend ``model`` other generation settings: handed to ``generate``, they would be mixed with its own."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, num_beams: int, generation: dict[str, Any]) -> Any:
    """The model's generation settings (its special tokens, above all), made greedy and without its length limits."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=max_new_tokens, max_length=None, num_beams=num_beams, num_return_sequences=1)
    settings.update(pad_token_id=pad_token_id(tokenizer))
    if settings.eos_token_id is None:
        settings.update(eos_token_id=tokenizer.eos_token_id)
    if not generation.get("do_sample"):
        # Chat models come with sampling switched on, which would make scores random.
        settings.update(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None)
    return settings


def _check_room(model: Any, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Models with a table of positions fail deep inside when a text is longer than that."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    if max_new_tokens > limit:
        raise LoraweaveError(f"max_new_tokens: {max_new_tokens} is more than the {limit} tokens the model can handle")
    answer = 0 if model.config.is_encoder_decoder else max_new_tokens
    for number, length in enumerate(lengths):
        if length + answer > limit:
            also = f" and {answer} new ones" if answer else ""
            raise LoraweaveError(
                f"inputs[{number}] has {length} tokens{also}, but the model reads {limit} at most; "
                f"pass max_input_length={max(limit - answer, 1)} to cut inputs, or leave this one out"
            )
