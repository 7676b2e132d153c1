"""Invariant 6: what was saved gives bit-identical outputs when it is loaded; a changed expert is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraweave as lw
import tiny
from methods import METHODS, PROMPT

CASES = [(a, m) for a in ("t5", "llama") for m in METHODS] + [("llama", m) for m in PROMPT]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, dict[str, str]]:
    """Experts as PEFT folders."""
    made = {}
    for architecture in ("t5", "llama"):
        place = tmp_path_factory.mktemp(architecture)
        experts = tiny.experts(tiny.model(architecture), architecture)
        made[architecture] = {name: str(lw.write_expert(e, place / name)) for name, e in experts.items()}
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {a: (tiny.model(a), tiny.model(a)) for a in ("t5", "llama")}


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_loaded_equals_saved(folders: Any, models: Any, architecture: str, method: str, tmp_path: Path) -> None:
    policy, inputs = (METHODS | PROMPT)[method], tiny.batch(architecture)
    one, other = models[architecture]
    mixture = tiny.randomize(lw.attach(one, folders[architecture], policy))
    expected = tiny.logits(one, inputs)
    for copy in (False, True):
        place = mixture.save_pretrained(tmp_path / f"saved{copy}", copy_experts=copy)
        loaded = lw.load(place, other)
        assert loaded.policy == policy
        assert loaded.experts == mixture.experts
        assert torch.equal(tiny.logits(other, inputs), expected), f"copies: {copy}"
        assert [s.name for s in loaded.sites] == [s.name for s in mixture.sites]
        loaded.detach()
    mixture.detach()


def test_a_changed_expert_is_noticed(tmp_path: Path) -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    sources = {n: lw.write_expert(e, tmp_path / n) for n, e in tiny.experts(host, "llama").items()}
    mixture = lw.attach(host, sources, lw.Sum())
    expected = tiny.logits(host, inputs)
    saved = mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    weights = sources["bee"] / "adapter_model.safetensors"
    good = weights.read_bytes()
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[0] += 1e-3
    save_file(tensors, weights)
    with pytest.raises(lw.LoraweaveError, match=r"expert 'bee' .* has changed since the mixture was saved") as error:
        lw.load(saved, host)
    assert "\n" not in str(error.value)
    changed = lw.load(saved, host, allow_changed=True)
    assert not torch.equal(tiny.logits(host, inputs), expected)
    changed.detach()
    weights.write_bytes(good)
    config = sources["bee"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 77}))
    with pytest.raises(lw.LoraweaveError, match=r"'bee' .* has changed"):
        lw.load(saved, host)


def test_a_mixture_with_its_own_blocks(tmp_path: Path) -> None:
    """What ``blocks=`` said is part of the mixture."""
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    sources = {n: lw.write_expert(e, tmp_path / n) for n, e in tiny.experts(host, "llama").items()}
    mixture = tiny.randomize(lw.attach(host, sources, lw.MoLE(), blocks=["LlamaMLP", "model.layers.1.self_attn"]))
    expected, sites = tiny.logits(host, inputs), [site.name for site in mixture.sites]
    assert "model.layers.0.mlp" in sites
    saved = mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    again = lw.load(saved, host)
    assert [site.name for site in again.sites] == sites
    assert torch.equal(tiny.logits(host, inputs), expected)
