"""Folding and exporting, for each kind of module and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny


def all_kinds() -> tuple[object, dict[str, lw.Expert]]:
    """GPT-2 with experts on Conv1D, Embedding and Linear."""
    host = tiny.model("gpt2", tie_word_embeddings=False)
    targets = [("wte", "c_attn"), ("lm_head", "wte", "mlp.c_proj"), ("c_fc", "wpe")]
    return host, {f"e{i}": tiny.expert(host, names, 1 + i, 0.3 + i, seed=i) for i, names in enumerate(targets)}


def test_each_kind_of_module() -> None:
    host, experts = all_kinds()
    inputs = tiny.batch("gpt2")
    mixture = lw.attach(host, experts, lw.Sum(0.7, {"e1": -1.1}))  # type: ignore[arg-type]
    before = tiny.logits(host, inputs)  # type: ignore[arg-type]
    mixture.fold()
    assert_close(tiny.logits(host, inputs), before, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]
    for path, layer in mixture.layers.items():
        expected = torch.zeros(layer.base.weight.shape, dtype=torch.float64)
        for (name, expert), g in zip(experts.items(), (0.7, -1.1, 0.7), strict=True):
            f = expert.factors.get(path)
            if f is not None:
                delta = g * f.scale * f.B.double() @ f.A.double()
                expected += delta if expected.shape == delta.shape and "lm_head" in path else delta.T
            assert name
        original = dict(all_kinds()[0].named_parameters())[f"{path}.weight"]  # type: ignore[attr-defined]
        assert torch.equal(layer.base.weight, (original.double() + expected).float()), f"{path}: rounded once"


def test_half_precision_is_rounded_once() -> None:
    host = tiny.model("llama", torch.bfloat16)
    experts = tiny.experts(host, "llama")
    path = "model.layers.0.self_attn.q_proj"
    original = host.get_submodule(path).weight.double()
    mixture = lw.attach(host, experts, lw.Sum(0.37))
    deltas = [
        0.37 * e.factors[path].scale * e.factors[path].B.bfloat16().double() @ e.factors[path].A.bfloat16().double()
        for e in experts.values()
    ]
    mixture.fold()
    assert torch.equal(host.get_submodule(path).base.weight, (original + sum(deltas)).bfloat16())


def test_tied_weights_are_not_folded_into_their_other_use() -> None:
    """GPT-2's head shares the embedding's weight; an expert of the embedding changes the embedding alone."""
    host, inputs = tiny.model("gpt2"), tiny.batch("gpt2")
    assert host.lm_head.weight is host.transformer.wte.weight
    mixture = lw.attach(host, {"a": tiny.expert(host, ["wte"], 2)}, lw.Sum())
    before = tiny.logits(host, inputs)
    mixture.fold()
    assert_close(tiny.logits(host, inputs), before, atol=1e-4, rtol=1e-4)
    mixture.unfold()
    assert host.lm_head.weight is host.transformer.wte.weight
    mixture.detach()
    assert host.lm_head.weight is host.transformer.wte.weight


def test_merged_expert_adds_ranks_and_drops_zeros() -> None:
    mixture = tiny.attached("llama", lw.Sum(weights={"bee": 0.0}))
    merged = mixture.merged_expert("both")
    assert merged.name == "both"
    ranks = {path: f.rank for path, f in merged.factors.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2 + 1
    assert ranks["model.layers.0.self_attn.k_proj"] == 2
    assert all(f.scale == 1.0 for f in merged.factors.values())
    mixture.policy = lw.Sum(0.0)
    with pytest.raises(lw.LoraweaveError, match="no LoRA to write"):
        mixture.merged_expert()


def test_export_does_not_overwrite(tmp_path: Path) -> None:
    mixture = tiny.attached("llama", lw.Sum())
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "precious.txt").write_text("x")
    with pytest.raises(lw.LoraweaveError, match="is not empty"):
        mixture.export_lora(tmp_path / "lora")
    mixture.export_lora(tmp_path / "lora", overwrite=True)
    assert (tmp_path / "lora" / "precious.txt").exists()
