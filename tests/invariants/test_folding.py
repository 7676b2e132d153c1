"""Invariant 2: folded weights and exported LoRAs equal the forward pass, for weights that depend on nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny
from methods import CONSTANT, GATED, ROUTED, STATIC

INPUT_FREE = CONSTANT | STATIC
BY_INPUT = GATED | ROUTED


@pytest.mark.parametrize("architecture", tiny.EVERY)
@pytest.mark.parametrize("method", INPUT_FREE)
def test_fold_equals_forward_and_unfold_is_exact(mixed: Any, architecture: str, method: str) -> None:
    mixture, inputs = mixed(architecture, INPUT_FREE[method]), tiny.batch(architecture)
    weights = dict(mixture.model.named_parameters())
    copies = {name: p.clone() for name, p in weights.items()}
    before = tiny.logits(mixture.model, inputs)
    mixture.fold()
    try:
        assert_close(tiny.logits(mixture.model, inputs), before, atol=1e-11, rtol=1e-11)
        assert any(not torch.equal(p, copies[name]) for name, p in mixture.model.named_parameters())
        gates = {id(p) for _, p in mixture.gate_parameters()}
        assert not any(p.requires_grad for p in mixture.model.parameters() if id(p) not in gates)
    finally:
        mixture.unfold()
    after = dict(mixture.model.named_parameters())
    assert all(after[name] is p and torch.equal(p, copies[name]) for name, p in weights.items())
    assert torch.equal(tiny.logits(mixture.model, inputs), before)


@pytest.mark.parametrize("architecture", tiny.EVERY)
@pytest.mark.parametrize("method", INPUT_FREE)
def test_exported_lora_in_peft_equals_the_mixture(architecture: str, method: str, tmp_path: Path) -> None:
    inputs = tiny.batch(architecture)
    mixture = tiny.randomize(tiny.attached(architecture, INPUT_FREE[method]))
    folder = mixture.export_lora(tmp_path / "lora")
    expected = tiny.logits(mixture.model, inputs)
    plain = peft.PeftModel.from_pretrained(tiny.model(architecture), folder).eval()
    assert_close(tiny.logits(plain, inputs), expected, atol=2e-5, rtol=1e-5)
    again = lw.attach(tiny.model(architecture), {"one": folder}, lw.Sum())
    assert_close(tiny.logits(again.model, inputs), expected, atol=2e-5, rtol=1e-5)


def test_export_keeps_masks_and_leaves_out_what_has_no_weight(tmp_path: Path) -> None:
    inputs = tiny.batch("t5")
    mixture = tiny.attached("t5", lw.Sum())
    with mixture.only("cat"):
        folder = mixture.export_lora(tmp_path / "lora")
        expected = tiny.logits(mixture.model, inputs)
    exported = lw.read_expert(folder)
    assert {f.rank for f in exported.factors.values()} == {1}
    assert set(exported.factors) == set(tiny.experts(tiny.model("t5"), "t5")["cat"].factors)
    plain = peft.PeftModel.from_pretrained(tiny.model("t5"), folder).eval()
    assert_close(tiny.logits(plain, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", BY_INPUT)
def test_weights_that_depend_on_the_input_cannot_be_folded(mixed: Any, method: str, tmp_path: Path) -> None:
    mixture, inputs = mixed("llama", BY_INPUT[method]), tiny.batch("llama")
    before = tiny.logits(mixture.model, inputs)
    with pytest.raises(lw.LoraweaveError, match="weights depend on the input"):
        mixture.fold()
    with pytest.raises(lw.LoraweaveError, match="weights depend on the input"):
        mixture.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert torch.equal(tiny.logits(mixture.model, inputs), before)


def test_folded_mixture_refuses_what_would_go_wrong() -> None:
    inputs = tiny.batch("llama")
    mixture = tiny.attached("llama", lw.Sum())
    mixture.fold()
    folded = tiny.logits(mixture.model, inputs)
    for forbidden in (mixture.fold, lambda: setattr(mixture, "policy", lw.Linear()), mixture.only("ant").__enter__):
        with pytest.raises(lw.LoraweaveError, match=r"folded into the weights; call unfold\(\) first"):
            forbidden()
    assert torch.equal(tiny.logits(mixture.model, inputs), folded)
    mixture.unfold()
    with pytest.raises(lw.LoraweaveError, match="not folded"):
        mixture.unfold()


def test_no_fold_under_a_mask_that_would_outlive_it() -> None:
    inputs = tiny.batch("llama")
    mixture = tiny.attached("llama", lw.Sum())
    full = tiny.logits(mixture.model, inputs)
    with mixture.only("ant"):
        alone = tiny.logits(mixture.model, inputs)
        with pytest.raises(lw.LoraweaveError, match="cannot fold while experts are masked"):
            mixture.fold()
        assert torch.equal(tiny.logits(mixture.model, inputs), alone)
    assert torch.equal(tiny.logits(mixture.model, inputs), full)


def test_detach_of_a_folded_mixture_restores_the_weights() -> None:
    host, inputs = tiny.model("gpt2"), tiny.batch("gpt2")
    bare = tiny.logits(host, inputs)
    mixture = lw.attach(host, tiny.experts(host, "gpt2"), lw.Sum())
    mixture.fold()
    mixture.detach()
    assert torch.equal(tiny.logits(host, inputs), bare)
