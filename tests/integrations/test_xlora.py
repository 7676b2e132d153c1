"""X-LoRA by peft: what it computes, that it leaves no trace, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import loraweave as lw
import tiny
from loraweave.errors import LoraweaveError
from loraweave.evaluation.data import Example
from loraweave.evaluation.scoring import predict
from loraweave.evaluation.yardsticks import Setting, XLoRA
from loraweave.integrations.xlora import wrapped
from loraweave.training.search import mean_loss

ROWS = [Example(a, b) for a in "abc" for b in ("xyz", "z")]


def setting(architecture: str = "llama", **options: Any) -> Setting:
    model = tiny.model(architecture)
    return Setting(model, tiny.tokenizer(False), tiny.experts(model, architecture), ROWS, options, 0)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_it_weighs_the_experts_by_the_bare_models_last_hidden_states(architecture: str) -> None:
    """Against the slow mixture, with weights worked out here; ranks and targets of the experts differ."""
    model, inputs = tiny.model(architecture), tiny.batch(architecture)
    experts = tiny.experts(model, architecture)
    assert len({f.rank for e in experts.values() for f in e.factors.values()}) > 1
    assert len({frozenset(e.factors) for e in experts.values()}) > 1
    with wrapped(model, experts, seed=3, global_scaling_weight=1.5) as tuned:
        found = tiny.logits(tuned, inputs)
        head = tuned.base_model.internal_xlora_classifier.layers[0]
        W, b = head.weight.detach().clone(), head.bias.detach().clone()
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    shares = (hidden @ W.T + b).softmax(-1)
    assert shares.std(1).max() > 0.01
    slow = tiny.slow_mixture(model, experts, lambda path: 1.5 * shares)
    assert_close(found, tiny.logits(slow, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layerwise", [False, True])
def test_layerwise_is_a_weight_for_every_module(layerwise: bool) -> None:
    given = setting(steps=1, batch_size=6)
    modules = {path for expert in given.experts.values() for path in expert.factors}
    with XLoRA(layerwise=layerwise).contest(given) as ready:
        head = ready.model.base_model.internal_xlora_classifier.layers[-1]
        assert head.out_features == len(given.experts) * (len(modules) if layerwise else 1)


def test_it_learns_and_leaves_the_model_as_it_was() -> None:
    given = setting(steps=15, batch_size=6)
    model, inputs = given.model, tiny.batch("llama")
    bare, keys = tiny.logits(model, inputs), list(model.state_dict())
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    attributes, caches = set(vars(model)), (model.config.use_cache, model.generation_config.use_cache)
    with wrapped(model, given.experts, 0) as untrained:
        before = mean_loss(untrained, given.batches(6))
    with XLoRA(learning_rate=0.05).contest(given) as ready:
        assert mean_loss(ready.model, given.batches(6)) < 0.9 * before
        answers = predict(ready.model, given.tokenizer, ["ab", "a"], max_new_tokens=3, progress=False)
        assert len(answers) == 2
        assert (ready.learned.evaluations, ready.learned.examples_seen) == (15, 90)
    assert torch.equal(tiny.logits(model, inputs), bare)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert (set(vars(model)), (model.config.use_cache, model.generation_config.use_cache)) == (attributes, caches)
    lw.attach(model, given.experts, lw.Sum()).detach()


def test_the_seed_decides() -> None:
    outs = []
    for seed in (1, 1, 2):
        given = setting()
        with wrapped(given.model, given.experts, seed) as tuned:
            outs.append(tiny.logits(tuned, tiny.batch("llama")))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("t5", "for decoder-only models; T5"), ("gpt2", "under 'model.' alone, .* GPT2LMHeadModel")],
)
def test_what_peft_cannot_do_is_refused(architecture: str, why: str) -> None:
    given = setting(architecture)
    names = [type(module) for module in given.model.modules()]
    with pytest.raises(LoraweaveError, match=why), XLoRA().contest(given):
        pass
    assert [type(module) for module in given.model.modules()] == names


def test_an_expert_that_peft_loses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a version of peft names experts otherwise."""
    from peft.tuners.xlora import model as peft_xlora

    given = setting()
    original = peft_xlora._load_adapter_into_lora_model

    def forgets(**arguments: Any) -> None:
        original(**arguments)
        if arguments["adapter_name"] == "1":
            for module in arguments["lora_model"].modules():
                if "1" in getattr(module, "lora_A", {}):
                    nn.init.zeros_(module.lora_A["1"].weight)

    monkeypatch.setattr(peft_xlora, "_load_adapter_into_lora_model", forgets)
    with pytest.raises(LoraweaveError, match="peft did not load expert 'bee'"), wrapped(given.model, given.experts, 0):
        pass
