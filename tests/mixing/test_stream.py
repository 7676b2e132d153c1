"""What gates learn of the tokens: masks, prompts and how they are passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing.stream import Arguments, Stream, StreamSpec, real_tokens
from loraweave.mixture import Mixture


@pytest.fixture(scope="module")
def llama() -> Mixture:
    return tiny.attached("llama", lw.Sum(), torch.float64)


def weights(mixture: Mixture, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with mixture.record() as seen, torch.no_grad():
        mixture.model(*args, **kwargs)
    return seen.weights


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(g, other[name], atol=1e-6) for name, g in one.items())


def test_arguments_are_found_however_they_are_passed(llama: Mixture) -> None:
    llama.policy = lw.MoLE(pooling="mean")
    tiny.randomize(llama)
    ids, mask = (tiny.batch("llama")[key] for key in ("input_ids", "attention_mask"))
    by_name = weights(llama, input_ids=ids, attention_mask=mask)
    assert same(by_name, weights(llama, ids, mask))
    assert same(by_name, weights(llama, ids, attention_mask=mask))
    assert not same(by_name, weights(llama, ids))
    assert same(by_name, weights(llama, inputs_embeds=llama.model.model.embed_tokens(ids), attention_mask=mask))
    assert same(by_name, weights(llama, ids, mask.bool()))


def test_arguments() -> None:
    class Module(torch.nn.Module):
        def forward(self, first: int, second: int = 0, *rest: int, third: int = 0) -> None: ...

    found = Arguments(Module())
    assert found.get("second", (1, 2), {}) == 2
    assert found.get("second", (1,), {"second": 5}) == 5
    assert found.get("second", (1,), {}) is None
    assert found.get("third", (1, 2), {"third": 7}) == 7
    assert found.get("absent", (1, 2, 3, 4, 5, 6), {}) is None
    assert found.get(None, (1,), {}) is None


def test_nothing_stays_from_an_earlier_call(llama: Mixture) -> None:
    llama.policy = lw.MoLE(pooling="prompt")
    tiny.randomize(llama)
    inputs = tiny.batch("llama")
    fresh = weights(llama, input_ids=inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100
    weights(llama, **inputs, labels=labels)
    assert same(fresh, weights(llama, input_ids=inputs["input_ids"]))


def test_after_an_error_all_is_well(llama: Mixture) -> None:
    llama.policy = lw.MoLE(pooling="mean")
    tiny.randomize(llama)
    inputs = tiny.batch("llama")
    expected = weights(llama, **inputs)
    with pytest.raises(Exception, match=r"."):
        llama.model(input_ids=torch.tensor([[99]]), attention_mask=torch.ones(1, 1))
    assert same(expected, weights(llama, **inputs))


@pytest.mark.parametrize("window", [9, 2])
@pytest.mark.parametrize("padding", ["blind", "all-seeing"])
@pytest.mark.parametrize("real", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
def test_real_tokens_of_a_static_caches_mask(real: list[int], padding: str, window: int) -> None:
    tokens, slots = len(real), 8
    sees = torch.zeros(1, 1, tokens, slots, dtype=torch.bool)
    for query in range(tokens):
        for slot in range(slots):
            past = query - window < slot <= query and bool(real[slot])
            sees[0, 0, query, slot] = past if real[query] or padding == "blind" else True
    if real[-1] == 0 and padding == "blind":
        sees[0, 0, 3:, :3] = window > 3  # padding behind the tokens may see them
    assert real_tokens(sees).int().tolist() == [real]
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert real_tokens(added).int().tolist() == [real]


def prompt_of(labels: list[int], mask: list[int]) -> list[int]:
    stream = Stream(StreamSpec("model", causal=True, prompted=True))
    stream.enter(torch.tensor([mask]), None)
    stream.labels = torch.tensor([labels])
    found = stream.prompt_mask(1, len(mask))
    assert found is not None
    return found.int()[0].tolist()


def test_the_prompt_is_what_precedes_the_first_label() -> None:
    assert prompt_of([-100, -100, 5, 6], [1, 1, 1, 1]) == [1, 1, 0, 0]
    assert prompt_of([-100, -100, 5, -100], [1, 1, 1, 0]) == [1, 1, 0, 0], "padded at the right"
    assert prompt_of([-100, -100, 5, 6], [0, 1, 1, 1]) == [0, 1, 0, 0], "padded at the left"
    assert prompt_of([-100, 5, -100, 6], [1, 1, 1, 1]) == [1, 0, 0, 0], "an answer with a gap"
    assert prompt_of([-100, -100], [1, 1]) == [1, 1]


def test_the_answer_never_reaches_a_prompt_gate(llama: Mixture) -> None:
    llama.policy = lw.MoLE(pooling="prompt")
    tiny.randomize(llama)
    inputs = tiny.batch("llama", (8, 6))
    labels = inputs["input_ids"].clone()
    labels[0, :4], labels[1, :2], labels[1, 6:] = -100, -100, -100
    expected = weights(llama, **inputs, labels=labels)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, 4:], changed["input_ids"][1, 2:6] = 9, 11
    other = torch.where(labels == -100, labels, changed["input_ids"])
    first = expected["model.layers.0"]
    assert_close(weights(llama, **changed, labels=other)["model.layers.0"], first, atol=0, rtol=0)
    for name, g in weights(llama, **changed, labels=other).items():
        assert_close(g, expected[name], atol=1e-12, rtol=1e-12, msg=f"{name}: the answer reached the gate")
    changed["input_ids"][0, 1] = 13
    assert not same(expected, weights(llama, **changed, labels=other)), "the prompt does reach it"


def test_a_stated_prompt_is_spread_over_beams_and_later_tokens(llama: Mixture) -> None:
    stream = Stream(StreamSpec("model", causal=True, prompted=True))
    stream.stated_prompt = torch.tensor([[False, True], [True, True]])
    found = stream.prompt_mask(6, 4)
    assert found is not None
    assert found.int().tolist() == [[0, 1, 0, 0]] * 3 + [[1, 1, 0, 0]] * 3
    before = llama._streams["model"].stated_prompt
    with pytest.raises(ZeroDivisionError), llama.prompt(torch.ones(1, 2)):
        raise ZeroDivisionError
    assert llama._streams["model"].stated_prompt is before


def test_masks_of_other_shapes_are_refused_where_they_matter(llama: Mixture) -> None:
    ids = torch.tensor([[5, 6, 7]])
    four = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    llama.policy = lw.MoLE(pooling="mean")
    with pytest.raises(lw.LoraweaveError, match=r"needs an attention mask of shape \[rows, 3\], got \[1, 1, 3, 3\]"):
        llama.model(ids, attention_mask=four)
    llama.policy = lw.MoLE(pooling="token")
    llama.model(ids, attention_mask=four)


def test_flatten_gates_say_what_is_too_long(llama: Mixture) -> None:
    llama.policy = lw.MoLE(pooling="flatten", max_length=4)
    llama.model(torch.tensor([[5, 6, 7, 8]]))
    with pytest.raises(lw.LoraweaveError, match=r"model.layers.0: .* at most max_length=4 tokens, got 5; shorten"):
        llama.model(torch.tensor([[5, 6, 7, 8, 9]]))
