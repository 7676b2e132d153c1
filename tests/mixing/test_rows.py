"""Batches whose rows have mixtures of their own: each row equals the same row alone under that mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.mixing.rows import RowsTerm
from loraweave.mixture import Mixture

ROWS: list[Mapping[str, float] | None] = [{"ant": 1.0}, {"bee": 0.5, "cat": -1.5}, None]
LAYERS = {"t5": "encoder.block.0.layer.0.SelfAttention.q", "llama": "model.layers.0.self_attn.q_proj"}


def attached(architecture: str, policy: Any = None, dtype: torch.dtype = torch.float64) -> Mixture:
    """Three experts, one of which extends the embeddings, too."""
    host = tiny.model(architecture, dtype)
    experts = tiny.experts(host, architecture, dtype)
    kind = tiny.ARCHITECTURES[architecture]
    embedding = {"t5": "shared", "llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[architecture]
    experts["cat"] = tiny.expert(host, (*kind.targets, embedding), 2, 0.4, seed=9, dtype=dtype)
    return lw.attach(host, experts, policy or lw.MoLE())


def alone(mixture: Mixture, row: Mapping[str, float] | None) -> lw.Sum:
    return lw.Sum(0.0, dict(row or {}))


@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("policy", [lw.MoLE(), lw.Linear(), lw.MoLE(activation="topk", pooling="mean")])
@pytest.mark.parametrize("reading", [0, 12], ids=["own copies", "all at once"])
def test_each_row_equals_itself_alone(
    architecture: str, policy: Any, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraweave.mixing.rows._READING", reading)
    mixture = tiny.randomize(attached(architecture, policy))
    inputs = tiny.batch(architecture, (9, 6, 4))
    own = tiny.logits(mixture.model, inputs)
    with mixture.rows(ROWS):
        together = tiny.logits(mixture.model, inputs)
    assert torch.equal(tiny.logits(mixture.model, inputs), own), "the policy is back"
    for number, row in enumerate(ROWS):
        mixture.policy = alone(mixture, row)
        one = tiny.row_of(inputs, number)
        expected = tiny.logits(mixture.model, one)[0]
        assert_close(tiny.real_logits(together, inputs, number), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}],
    ids=str,
)
def test_generation(architecture: str, how: dict[str, Any]) -> None:
    mixture = attached(architecture)
    inputs = tiny.batch(architecture, (7, 5, 3), side="left")
    asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD} | how
    with mixture.rows(ROWS):
        together = mixture.model.generate(**asked, **settings)
    answers = how.get("num_return_sequences", 1)
    seen = []
    for number, row in enumerate(ROWS):
        mixture.policy = alone(mixture, row)
        one = mixture.model.generate(**{key: value[number : number + 1] for key, value in asked.items()}, **settings)
        assert torch.equal(together[number * answers : (number + 1) * answers], one)
        seen.append(one[0, -6:].tolist())
    assert seen[0] != seen[1] != seen[2]


def test_sampling_several_answers_takes_each_mixture_for_its_own() -> None:
    mixture = attached("llama")
    ids = tiny.batch("llama", (5, 5))["input_ids"]
    with mixture.rows([{"ant": 1.0}, None]):
        four = tiny.logits(mixture.model, {"input_ids": ids.repeat_interleave(2, 0)})
        two = tiny.logits(mixture.model, {"input_ids": ids})
    assert_close(four, two.repeat_interleave(2, 0))


def test_only_rank_rows_that_a_row_needs_are_kept() -> None:
    mixture = attached("llama")
    layer = mixture.layers["model.layers.0.self_attn.q_proj"]  # ranks 2, 3 and 2
    for rows, own, shape in (
        ([{"ant": 1.0}, {"bee": 1.0}], True, (2, 3, tiny.WIDTH)),
        ([{"ant": 1.0}, {"ant": 2.0}, None], False, (2, tiny.WIDTH)),
        ([{"ant": 1.0, "cat": 0.0}], False, (2, tiny.WIDTH)),
    ):
        with mixture.rows(rows):
            assert isinstance(layer.rows, RowsTerm)
            assert (layer.rows.own is not None) is own
            assert (layer.rows.factors() if layer.rows.own is None else layer.rows.own)[0].shape == shape
    assert layer.rows is None


def test_gradients_reach_inputs_and_the_model_may_move() -> None:
    mixture = attached("llama")
    inputs = tiny.batch("llama", (6, 6, 6))
    states = mixture.model.model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    with mixture.rows(ROWS):
        mixture.model(inputs_embeds=states).logits.square().sum().backward()
        before = tiny.logits(mixture.model, inputs)
        mixture.model.float()
        assert_close(tiny.logits(mixture.model, inputs), before.float(), atol=1e-4, rtol=1e-4)
    assert states.grad is not None
    assert states.grad.abs().amin(0).max() > 0


def test_refusals() -> None:
    mixture = attached("llama")
    inputs = tiny.batch("llama", (4, 4, 4))
    for rows, match in (
        ([{"ant": 1.0}] * 2, r"was given 2 mixtures, but a batch of 3 rows came"),
        ([{"art": 1.0}] * 3, r"unknown expert 'art'; did you mean"),
        ([{"ant": float("nan")}] * 3, r"rows, row 0 weight of 'ant': expected a finite number, got nan"),
        ({"ant": 1.0}, r"rows: expected a list with one entry per row"),
        ([], r"rows: expected a list"),
        ([None, "ant", None], r"rows: expected \{expert: weight\} or None in row 1, got 'ant'"),
    ):
        with pytest.raises(lw.LoraweaveError, match=match), mixture.rows(rows):  # type: ignore[arg-type]
            tiny.logits(mixture.model, inputs)
    with pytest.raises(lw.LoraweaveError, match="together with a mask"), mixture.only("ant"), mixture.rows(ROWS):
        pass
    with mixture.rows(ROWS):
        with pytest.raises(lw.LoraweaveError, match=r"cannot mask experts while rows"), mixture.only("ant"):
            pass
        with pytest.raises(lw.LoraweaveError, match=r"cannot change the policy while rows"):
            mixture.policy = lw.Sum()
    mixture.policy = lw.MoLE(mix="outputs", evidence="outputs", gate_form="full")
    with pytest.raises(lw.LoraweaveError, match=r"together with mix='outputs'"), mixture.rows(ROWS):
        pass
    mixture.policy = lw.Sum()
    mixture.fold()
    with pytest.raises(lw.LoraweaveError, match=r"folded"), mixture.rows(ROWS):
        pass
    mixture.detach()
