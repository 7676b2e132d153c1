"""Byte-level tokenizers and tiny models with random weights, made here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]


def byte_tokenizer(template: str, **special: str) -> Any:
    """Every byte is a token; ``template`` says which special tokens a text gets, e.g. ``"<s> $A"``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


@pytest.fixture(scope="session")
def t5_tokenizer() -> Any:
    return byte_tokenizer("$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    """Starts texts with <s> and has no pad token, as Llama's own."""
    return byte_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny(kind: str) -> Any:
    """A model in double precision, so that batching cannot turn round a close decision; large random weights make its
    answers depend on its input."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 260, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        config = T5Config(
            **sizes, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.2
        )
        model: Any = T5ForConditionalGeneration(config)
    elif kind == "llama":
        config = LlamaConfig(
            **{**sizes, "pad_token_id": None},
            bos_token_id=2,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            attention_dropout=0.2,
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(**sizes, bos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed" in name or "shared" in name or "wte" in name else 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    # A tenth of all bytes end the answer, so that some rows of a batch end before others.
    model.generation_config.eos_token_id = [1, *range(100, 126)]
    return model.double().eval()


@pytest.fixture(scope="session")
def t5() -> Any:
    return tiny("t5")


@pytest.fixture(scope="session")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="session")
def gpt2() -> Any:
    return tiny("gpt2")
