"""Invariant 4: generating with a key-value cache equals generating without, greedy and beam, padded or not."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixture import Mixture
from methods import CAUSAL, METHODS, PROMPT, PROMPTED, ROUTED

NEW = 5
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "beam": {"num_beams": 3}}
ALL = METHODS | PROMPT
FEW = ("sum", "mole", "mole-matrix", "mole-topk")  # what the other architectures are tested with
CASES = [
    (architecture, method, search)
    for architecture in ("t5", "llama", "bart", "whisper", "gpt2", "qwen3")
    for method in (CAUSAL if architecture in ("t5", "llama") else FEW)
    for search in (SEARCHES if ALL[method].mix == "deltas" else ("greedy",))
] + [
    (architecture, method, search)
    for architecture in ("llama", "gpt2", "t5")
    for method in PROMPTED
    for search in SEARCHES
    if architecture != "t5" or method in ROUTED
]


def prompts(architecture: str, lengths: tuple[int, ...] = (6, 2, 4)) -> dict[str, Tensor]:
    side = "left" if tiny.ARCHITECTURES[architecture].kind == "causal" else "right"
    inputs = tiny.batch(architecture, lengths, side)
    inputs.pop("decoder_input_ids", None)
    inputs.pop("position_ids", None)
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].double()
    return inputs


def generate(mixture: Mixture, inputs: dict[str, Tensor], use_cache: bool = True, **options: Any) -> Any:
    prompted = [ALL[method] for method in PROMPTED]
    told = mixture.policy in prompted and not use_cache and not mixture.model.config.is_encoder_decoder
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_scores": True}
    with mixture.prompt(inputs["attention_mask"]) if told else nullcontext():
        return mixture.model.generate(
            **inputs, use_cache=use_cache, return_dict_in_generate=True, **(settings | options)
        )


@pytest.mark.parametrize(("architecture", "method", "search"), CASES)
def test_cached_equals_uncached(mixed: Any, architecture: str, method: str, search: str) -> None:
    mixture, inputs = mixed(architecture, ALL[method]), prompts(architecture)
    cached, uncached = (generate(mixture, inputs, use, **SEARCHES[search]) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert len(cached.scores) == NEW
    for a, b in zip(cached.scores, uncached.scores, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    if search == "beam":
        assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("architecture", "method"), [("t5", "mole"), ("llama", "mole"), ("llama", "mole-prompt")])
def test_a_row_generates_what_it_does_alone(mixed: Any, architecture: str, method: str) -> None:
    mixture, inputs = mixed(architecture, ALL[method]), prompts(architecture)
    together = generate(mixture, inputs)
    for row in range(3):
        alone = generate(mixture, tiny.row_of(inputs, row))
        assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])
        assert_close(alone.scores[-1][0], together.scores[-1][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_sampling_with_a_seed(mixed: Any, architecture: str) -> None:
    mixture, inputs, drawn = mixed(architecture, lw.MoLE()), prompts(architecture), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(mixture, inputs, use_cache, do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_gates_that_read_the_whole_sequence_refuse_a_cache(mixed: Any, architecture: str, pooling: Any) -> None:
    mixture, inputs = mixed(architecture, lw.MoLE(pooling=pooling, max_length=16)), prompts(architecture)
    with pytest.raises(lw.LoraweaveError, match=f"{pooling!r} pooling reads the whole sequence.*use_cache=False"):
        generate(mixture, inputs)
    out = generate(mixture, inputs, use_cache=False)
    assert out.sequences.shape[0] == 3


def test_uncached_generation_needs_to_be_told_the_prompt(mixed: Any) -> None:
    mixture, inputs = mixed("llama", PROMPT["mole-prompt"]), prompts("llama")
    told = generate(mixture, inputs, use_cache=False)
    untold = mixture.model.generate(
        **inputs, use_cache=False, max_new_tokens=NEW, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    assert (told.scores[-1] - untold.scores[-1]).abs().max() > 1e-3, "so the test above tests something"


def test_a_loop_of_ones_own_with_a_cache(mixed: Any) -> None:
    """As users write it: the model makes the cache itself in the first call."""
    inputs = prompts("llama", (5,))
    for method in ("mole", "mole-prompt"):
        mixture = mixed("llama", ALL[method])
        expected = generate(mixture, inputs).sequences
        ids, cache, fed = inputs["input_ids"], None, inputs["input_ids"]
        with torch.no_grad():
            for _ in range(NEW):
                out = mixture.model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, fed], dim=1)
        assert torch.equal(ids, expected), method


def test_a_cache_filled_elsewhere_is_noticed(mixed: Any) -> None:
    from transformers import DynamicCache

    mixture, inputs = mixed("llama", PROMPT["mole-prompt"]), prompts("llama", (5,))
    cache = DynamicCache(config=mixture.model.config)
    tiny.model("llama", torch.float64)(input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True)
    with pytest.raises(lw.LoraweaveError, match="filled outside of this mixture"):
        mixture.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("method", PROMPTED)
def test_a_copied_cache_knows_what_was_decided(mixed: Any, method: str) -> None:
    """As users do who ask several questions about one text."""
    mixture, inputs = mixed("llama", ALL[method]), prompts("llama", (5,))
    with torch.no_grad():
        cache = mixture.model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
        copies = [copy.deepcopy(cache) for _ in range(2)]
        first, second, third = (
            mixture.model(input_ids=torch.tensor([[7]]), past_key_values=each).logits for each in (cache, *copies)
        )
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_changing_the_policy_between_prompt_and_answer_is_noticed(mixed: Any) -> None:
    from transformers import DynamicCache

    mixture, inputs = mixed("llama", PROMPT["mole-prompt"]), prompts("llama", (5,))
    cache = DynamicCache(config=mixture.model.config)
    with torch.no_grad():
        mixture.model(input_ids=inputs["input_ids"], past_key_values=cache)
        mixture.policy = PROMPT["mole-prompt"]
        with pytest.raises(lw.LoraweaveError, match="filled outside of this mixture"):
            mixture.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_two_prompts_at_a_time_keep_their_own_decisions(mixed: Any) -> None:
    """Two caches, used in turn."""
    from transformers import DynamicCache

    mixture = mixed("llama", PROMPT["mole-prompt"])
    expected, caches, fed = [], [], []
    for seed in (1, 2):
        inputs = {"input_ids": tiny.batch("llama", (5,), seed=seed)["input_ids"]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(generate(mixture, inputs).sequences[0, 5:].tolist())
        caches.append(DynamicCache(config=mixture.model.config))
        fed.append(inputs["input_ids"])
    got: list[list[int]] = [[], []]
    with torch.no_grad():
        for _ in range(NEW):
            for i in (0, 1):
                out = mixture.model(input_ids=fed[i], past_key_values=caches[i])
                fed[i] = out.logits[:, -1:].argmax(-1)
                got[i].append(int(fed[i]))
    assert got == expected


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_outputs_mode_refuses_beams_with_a_cache(mixed: Any, architecture: str) -> None:
    mixture, inputs = mixed(architecture, METHODS["mole-outputs"]), prompts(architecture)
    with pytest.raises(lw.LoraweaveError, match="beam"):
        generate(mixture, inputs, num_beams=3)
    assert generate(mixture, inputs, use_cache=False, num_beams=2).sequences.shape[0] == 3


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["sum", "mole", *PROMPTED])
def test_static_cache(mixed: Any, architecture: str, method: str, search: str) -> None:
    """transformers then hides the tokens' mask in a four-dimensional one."""
    mixture, inputs = mixed(architecture, ALL[method]), prompts(architecture)
    expected = generate(mixture, inputs, **SEARCHES[search])
    got = generate(mixture, inputs, cache_implementation="static", disable_compile=True, **SEARCHES[search])
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.scores, expected.scores, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
