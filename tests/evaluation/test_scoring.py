"""Generation in batches: the same answers whatever the batches, and nothing left changed."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example
from loraweave.evaluation.metrics import Metric
from loraweave.evaluation.scoring import evaluating, predict, score

INPUTS = ["b", "a long input with many bytes in it", "", "ü is two", "x" * 50, "b", "one more"]
KINDS = ["t5", "llama"]


def pair(kind: str, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    name = "t5" if kind == "t5" else "llama"
    return request.getfixturevalue(kind), request.getfixturevalue(f"{name}_tokenizer")


def plain(model: Any, tokenizer: Any, text: str, beams: int = 1) -> str:
    """One input at a time, no padding, tokens by hand."""
    causal = not model.config.is_encoder_decoder
    body = list(tokenizer(text + "\n" * causal, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([[2, *body] if causal else [*body, 1]])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, num_beams=beams, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(new[0, ids.shape[1] if causal else 0 :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_single_inputs_in_order(kind: str, beams: int, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(kind, request)
    expected = [plain(model, tokenizer, text, beams) for text in INPUTS]
    assert len(set(expected)) >= 5, "the tiny model must tell inputs apart for this to test anything"
    assert len(set(map(len, expected))) >= 2, "and must end some answers early"
    for batch_size in (1, 3, 32):
        got = predict(
            model, tokenizer, INPUTS, max_new_tokens=12, batch_size=batch_size, num_beams=beams, progress=False
        )
        assert got == expected


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_inputs_permutes_answers(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(kind, request)
    options = {"max_new_tokens": 6, "batch_size": 2, "progress": False}
    answers = predict(model, tokenizer, INPUTS, **options)
    assert predict(model, tokenizer, INPUTS[::-1], **options) == answers[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_evaluation_mode_and_leaves_everything_as_it_was(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(kind, request)
    options = {"max_new_tokens": 6, "progress": False}
    expected = predict(model, tokenizer, INPUTS, **options)
    model.train()
    frozen = next(module for name, module in model.named_modules() if name.endswith(("0.mlp", "layer.1")))
    frozen.eval()
    before = [module.training for module in model.modules()]
    padding, settings = (tokenizer.padding_side, tokenizer.pad_token), model.generation_config.to_dict()
    try:
        # Dropout is at work in training mode, so the answers would differ.
        assert predict(model, tokenizer, INPUTS, **options) == expected
        assert [module.training for module in model.modules()] == before
        assert any(before)
        assert not all(before)
    finally:
        model.eval()
    assert (tokenizer.padding_side, tokenizer.pad_token) == padding
    assert model.generation_config.to_dict() == settings


def test_modes_come_back_after_an_exception(t5: Any) -> None:
    def interrupted() -> None:
        with evaluating(t5):
            assert not t5.training
            raise KeyboardInterrupt

    t5.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert t5.training
    finally:
        t5.eval()


def test_greedy_whatever_the_model_likes(
    llama: Any, llama_tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 8, "progress": False}
    expected = predict(llama, llama_tokenizer, INPUTS, **options)
    chatty = copy.deepcopy(llama.generation_config)
    chatty.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=50, max_length=20, num_beams=2)
    before = chatty.to_dict()
    monkeypatch.setattr(llama, "generation_config", chatty)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert predict(llama, llama_tokenizer, INPUTS, **options) == expected
    assert caplog.records == []
    torch.manual_seed(0)
    assert predict(llama, llama_tokenizer, INPUTS, do_sample=True, **options) != expected
    assert llama.generation_config is chatty
    assert chatty.to_dict() == before


def test_length_of_answers(llama: Any, llama_tokenizer: Any) -> None:
    for longest in (1, 9):
        answers = predict(llama, llama_tokenizer, INPUTS, max_new_tokens=longest, progress=False)
        assert max(len(llama_tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers) <= 3 * longest
        assert any(answers)


def test_separator_and_cut_change_the_prompt(llama: Any, llama_tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "progress": False}
    assert predict(llama, llama_tokenizer, ["ab"], separator="\n", **options) == predict(
        llama, llama_tokenizer, ["ab\n"], separator="", **options
    )
    cut = predict(llama, llama_tokenizer, ["xxxx" + "abc"], max_input_length=5, **options)
    assert cut == predict(llama, llama_tokenizer, ["abc"], **options)


def test_progress_bar(t5: Any, t5_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    predict(t5, t5_tokenizer, INPUTS, max_new_tokens=2, batch_size=2, description="scoring qa")
    shown = capsys.readouterr().err
    assert "scoring qa" in shown
    assert f"{len(INPUTS)}/{len(INPUTS)}" in shown
    predict(t5, t5_tokenizer, INPUTS, max_new_tokens=2, progress=False)
    assert capsys.readouterr().err == ""


def test_no_inputs_no_answers(t5: Any, t5_tokenizer: Any) -> None:
    assert predict(t5, t5_tokenizer, [], progress=False) == []


def test_tables_of_positions_are_used_to_the_end(t5_tokenizer: Any) -> None:
    config = BartConfig(
        vocab_size=260,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).eval()
    options: dict[str, Any] = {"progress": False, "min_new_tokens": 24}
    # Encoder and decoder have a table each, so input and answer do not share the room.
    assert len(predict(model, t5_tokenizer, ["y" * 23], max_new_tokens=24, **options)) == 1
    with pytest.raises(LoraweaveError, match=r"inputs\[0\] has 25 tokens, but the model reads 24"):
        predict(model, t5_tokenizer, ["y" * 24], max_new_tokens=24, **options)
    with pytest.raises(LoraweaveError, match="max_new_tokens: 25 is more than the 24"):
        predict(model, t5_tokenizer, ["y"], max_new_tokens=25, **options)


def test_inputs_too_long_for_the_model(gpt2: Any, llama_tokenizer: Any, t5: Any, t5_tokenizer: Any) -> None:
    long = ["short", "y" * 60]
    with pytest.raises(
        LoraweaveError, match=r"inputs\[1\] has 62 tokens and 8 new ones.*64 at most.*max_input_length=56"
    ):
        predict(gpt2, llama_tokenizer, long, max_new_tokens=8, progress=False)
    assert len(predict(gpt2, llama_tokenizer, long, max_new_tokens=8, max_input_length=56, progress=False)) == 2
    # T5 has no table of positions.
    assert len(predict(t5, t5_tokenizer, ["y" * 600], max_new_tokens=2, progress=False)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_beams": -1}, "num_beams"),
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences"),
    ],
)
def test_bad_options(options: dict[str, int], message: str, t5: Any, t5_tokenizer: Any) -> None:
    with pytest.raises(LoraweaveError, match=message):
        predict(t5, t5_tokenizer, INPUTS, progress=False, **options)  # type: ignore[arg-type]


def test_one_text_is_not_a_list(t5: Any, t5_tokenizer: Any) -> None:
    with pytest.raises(LoraweaveError, match="list of texts"):
        predict(t5, t5_tokenizer, "abc", progress=False)


def test_only_models_that_generate(t5: Any, t5_tokenizer: Any) -> None:
    with pytest.raises(LoraweaveError, match=r"got T5Stack; of a mixture, pass \.model"):
        predict(t5.get_encoder(), t5_tokenizer, INPUTS, progress=False)


def test_score(t5: Any, t5_tokenizer: Any) -> None:
    options = {"max_new_tokens": 6, "progress": False}
    answers = predict(t5, t5_tokenizer, INPUTS, **options)
    right = {0, 3, 4}
    examples = [
        Example(text, "wrong", (answers[n],) if n in right else ("also wrong",)) for n, text in enumerate(INPUTS)
    ]
    result = score(t5, t5_tokenizer, examples, "accuracy", **options)
    assert result.predictions == tuple(answers)
    assert result.per_item == tuple(100.0 * (n in right) for n in range(len(INPUTS)))
    assert result.value == pytest.approx(300 / len(INPUTS))
    assert (result.n, result.metric) == (len(INPUTS), "accuracy")
    assert result.seconds > 0


def test_score_takes_a_metric_of_ones_own(t5: Any, t5_tokenizer: Any) -> None:
    constant = Metric("constant", "always 7", lambda prediction, references: 7.0)
    result = score(t5, t5_tokenizer, [Example("a", "b")], constant, max_new_tokens=2, progress=False)
    assert (result.metric, result.value) == ("constant", 7.0)


def test_score_refuses(t5: Any, t5_tokenizer: Any) -> None:
    with pytest.raises(LoraweaveError, match="no examples to score"):
        score(t5, t5_tokenizer, [])
    with pytest.raises(LoraweaveError, match="unknown metric 'blue'; did you mean 'bleu'"):
        score(t5, t5_tokenizer, [Example("a", "b")], "blue")
