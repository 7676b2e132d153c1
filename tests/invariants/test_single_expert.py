"""Invariant 1: no weight is the bare model, all weight on one expert is that adapter in peft, equal experts share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
import tiny
from methods import METHODS, PROMPT, ROUTED

# Policies that name no expert, and under which an expert left alone has weight 1.
UNIT = ["sum", "linear", *ROUTED] + [n for n, p in METHODS.items() if n.startswith("mole") and p.normalized]

# Two adapters an architecture: plain LoRA, and one with all that peft can vary.
TWISTED: dict[str, dict[str, Any]] = {
    "t5": {"target_modules": ["q", "wo", "lm_head"], "rank_pattern": {"encoder.block.0.layer.0.SelfAttention.q": 6}},
    "bart": {"target_modules": ["v_proj", "fc1"], "rank_pattern": {"fc1": 1}, "alpha_pattern": {"v_proj": 7}},
    "whisper": {"target_modules": ["k_proj", "fc2"], "alpha_pattern": {"decoder.*k_proj": 5}},
    "llama": {"target_modules": ["embed_tokens", "down_proj", "lm_head"], "rank_pattern": {"embed_tokens": 5}},
    "qwen3": {"target_modules": "all-linear", "rank_pattern": {"layers.1.mlp.up_proj": 1}},
    "gpt2": {"target_modules": ["wte", "mlp.c_proj"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["dense", "word_embeddings"], "alpha_pattern": {"output.dense": 3}},
    "albert": {"target_modules": ["dense", "ffn"]},
}


@dataclasses.dataclass
class Adapted:
    """What peft says: adapter folders, and the logits with each of them."""

    folders: dict[str, Path]
    logits: dict[str, Tensor]
    inputs: dict[str, Tensor]
    mixture: Any


@pytest.fixture(scope="module", params=tiny.EVERY)
def adapted(request: Any, tmp_path_factory: Any) -> Adapted:
    name = request.param
    kind, inputs = tiny.ARCHITECTURES[name], tiny.batch(name)
    configs = {
        "plain": {"r": 3, "lora_alpha": 5, "target_modules": list(kind.targets)},
        "twisted": {"r": 2, "lora_alpha": 3, "use_rslora": True} | TWISTED[name],
    }
    folders, logits = {}, {}
    for number, (adapter, config) in enumerate(configs.items()):
        torch.manual_seed(number)
        tuned = peft.get_peft_model(tiny.model(name), peft.LoraConfig(init_lora_weights=False, **config)).eval()
        folders[adapter] = tmp_path_factory.mktemp(name) / adapter
        tuned.save_pretrained(folders[adapter], save_embedding_layers=False)
        logits[adapter] = tiny.logits(tuned.double(), inputs)
    return Adapted(folders, logits, inputs, lw.attach(tiny.model(name, torch.float64), folders))


def test_one_expert_alone_is_that_adapter_in_peft(adapted: Adapted) -> None:
    assert (adapted.logits["plain"] - adapted.logits["twisted"]).abs().max() > 1e-2
    for method in UNIT:
        adapted.mixture.policy = METHODS[method]
        tiny.randomize(adapted.mixture)
        for name, expected in adapted.logits.items():
            with adapted.mixture.only(name):
                close(tiny.logits(adapted.mixture.model, adapted.inputs), expected, f"{method}, only {name}")
            other = next(n for n in adapted.logits if n != name)
            with adapted.mixture.without(other):
                close(tiny.logits(adapted.mixture.model, adapted.inputs), expected, f"{method}, without {other}")


def test_weight_one_on_one_expert_is_that_adapter(adapted: Adapted) -> None:
    for name, expected in adapted.logits.items():
        for policy in (lw.Linear({name: 0.3}), lw.Sum(0.0, {name: 1.0}), lw.Linear(blocks={"*": {name: 2.0}})):
            adapted.mixture.policy = policy
            close(tiny.logits(adapted.mixture.model, adapted.inputs), expected, repr(policy))


def test_no_weight_is_the_bare_model_exactly(adapted: Adapted, request: Any) -> None:
    adapted.mixture.policy = lw.Sum(0.0)
    bare = tiny.model(request.node.callspec.params["adapted"], torch.float64)
    assert torch.equal(tiny.logits(adapted.mixture.model, adapted.inputs), tiny.logits(bare, adapted.inputs))


def close(got: Tensor, expected: Tensor, said: str) -> None:
    assert_close(got, expected, atol=1e-8, rtol=1e-8, msg=lambda m: f"{said}: {m}")


@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2", "bert"])
def test_equal_experts_that_share_one_are_one_of_them(architecture: str) -> None:
    bare = tiny.model(architecture, torch.float64)
    one = tiny.expert(bare, tiny.ARCHITECTURES[architecture].targets, 3, 0.8)
    inputs = tiny.batch(architecture)
    single = lw.attach(bare, {"one": one}, lw.Sum())
    expected = tiny.logits(bare, inputs)
    single.detach()
    mixture = lw.attach(bare, dict.fromkeys(tiny.NAMES, one), lw.Linear())
    prompt = PROMPT if tiny.ARCHITECTURES[architecture].kind == "causal" else {}
    for name, policy in (METHODS | prompt).items():
        if not policy.normalized:
            continue
        if name.startswith("mole"):
            policy = dataclasses.replace(policy, scale=1.0, learn_scale=False)
        mixture.policy = policy
        tiny.randomize(mixture)
        # Gates work in single precision, so their weights sum to one to about 1e-7.
        assert_close(tiny.logits(bare, inputs), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_untrained_gates_are_linear_at_scale_one_and_the_sum_at_scale_n(architecture: str, granularity: Any) -> None:
    inputs = tiny.batch(architecture)
    mixture = tiny.attached(architecture, lw.Linear(), torch.float64)
    linear = tiny.logits(mixture.model, inputs)
    mixture.policy = lw.Sum()
    summed = tiny.logits(mixture.model, inputs)
    for gate_form in ("full", "compact"):
        mixture.policy = lw.MoLE(granularity, gate_form=gate_form, scale=1.0)
        assert_close(tiny.logits(mixture.model, inputs), linear, atol=1e-6, rtol=1e-6)
        mixture.policy = lw.MoLE(granularity, gate_form=gate_form, scale="experts")
        assert_close(tiny.logits(mixture.model, inputs), summed, atol=1e-6, rtol=1e-6)
