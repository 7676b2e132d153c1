"""Invariant 7: detach gives the model back exactly; attaching twice is an error; a failed attach changes nothing."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import loraweave as lw
import tiny
from methods import METHODS


class Snapshot:
    """Everything about a model that attaching could change."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
        self.keys = list(model.state_dict())
        self.grads = {name: p.requires_grad for name, p in model.named_parameters()}
        self.weights = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
        self.training = [m.training for m in model.modules()]
        self.hooks = self.count_hooks()

    def count_hooks(self) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
        return sum(len(getattr(m, kind)) for m in self.model.modules() for kind in kinds)

    def check(self) -> None:
        again = Snapshot(self.model)
        assert again.modules == self.modules
        assert again.keys == self.keys
        assert again.grads == self.grads
        assert again.training == self.training
        assert again.hooks == self.hooks
        for name, (identity, values) in self.weights.items():
            assert again.weights[name][0] == identity
            assert torch.equal(again.weights[name][1], values), name


@pytest.mark.parametrize("architecture", tiny.EVERY)
def test_detach_restores_everything(architecture: str) -> None:
    host, inputs = tiny.model(architecture), tiny.batch(architecture)
    some = next(p for p in host.parameters())
    some.requires_grad_(False)
    before, bare = Snapshot(host), tiny.logits(host, inputs)
    experts = tiny.experts(host, architecture)
    for method in METHODS:
        mixture = lw.attach(host, experts, METHODS[method])
        tiny.randomize(mixture)
        assert not torch.equal(tiny.logits(host, inputs), bare)
        assert mixture.detach() is host
        before.check()
        assert torch.equal(tiny.logits(host, inputs), bare), method


def test_detach_after_much_use() -> None:
    host, inputs = tiny.model("t5"), tiny.batch("t5")
    before, bare = Snapshot(host), tiny.logits(host, inputs)
    mixture = lw.attach(host, tiny.experts(host, "t5"), lw.MoLE(mix="outputs", evidence="outputs", gate_form="full"))
    mixture.policy = lw.MoLE()
    host(**inputs).logits.sum().backward()
    with mixture.only("ant"), mixture.record():
        mixture.policy = lw.Linear()
        host.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    mixture.policy = lw.Sum()
    mixture.fold()
    mixture.unfold()
    mixture.fold()
    mixture.detach()
    before.check()
    assert torch.equal(tiny.logits(host, inputs), bare)
    for use in (mixture.detach, lambda: mixture.layers, lambda: setattr(mixture, "policy", lw.Sum())):
        with pytest.raises(lw.LoraweaveError, match="detached"):
            use()


def test_detach_inside_contexts_leaves_no_trace() -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    before, bare = Snapshot(host), tiny.logits(host, inputs)
    mixture = lw.attach(host, tiny.experts(host, "llama"), lw.MoLE())
    with mixture.only("ant"), mixture.record(), mixture.prompt(inputs["attention_mask"]):
        mixture.detach()
    before.check()
    assert torch.equal(tiny.logits(host, inputs), bare)


def test_training_mode_follows_the_model() -> None:
    host = tiny.model("t5").train()
    before = Snapshot(host)
    mixture = lw.attach(host, tiny.experts(host, "t5"), lw.MoLE())
    assert all(m.training for m in host.modules())
    host.eval()
    assert not any(m.training for m in host.modules())
    host.train()
    mixture.detach()
    before.check()


def test_tied_modules_are_all_replaced_and_restored() -> None:
    """One module object at two places stays one object."""
    host = tiny.model("llama")
    host.model.layers[1].mlp = host.model.layers[0].mlp
    before, inputs = Snapshot(host), tiny.batch("llama")
    bare = tiny.logits(host, inputs)
    factors = tiny.expert(host, ["layers.0.mlp.up_proj"])
    mixture = lw.attach(host, {"a": factors}, lw.Sum())
    assert host.model.layers[1].mlp.up_proj is host.model.layers[0].mlp.up_proj
    slow = tiny.model("llama")
    slow.model.layers[1].mlp = slow.model.layers[0].mlp
    tiny.slow_mixture(slow, {"a": factors}, lambda path: torch.ones(1, 1, 1))
    torch.testing.assert_close(tiny.logits(host, inputs), tiny.logits(slow, inputs), atol=1e-5, rtol=1e-5)
    mixture.detach()
    before.check()
    assert torch.equal(tiny.logits(host, inputs), bare)


def test_attaching_twice_is_an_error() -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    experts = tiny.experts(host, "llama")
    mixture = lw.attach(host, experts, lw.Sum())
    out = tiny.logits(host, inputs)
    with pytest.raises(lw.LoraweaveError, match=r"attached to this model already.*detach\(\) first"):
        lw.attach(host, experts, lw.Sum())
    with pytest.raises(lw.LoraweaveError, match="attached to this model already"):
        lw.attach(host.model, experts, lw.Sum())
    assert torch.equal(tiny.logits(host, inputs), out)
    mixture.detach()
    lw.attach(host, experts, lw.Sum())


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_pefts_adapters_is_refused(wrapped: bool) -> None:
    host = tiny.model("llama")
    experts = tiny.experts(host, "llama")
    tuned = peft.get_peft_model(host, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lw.LoraweaveError, match=r"peft's own adapters .*unload\(\)"):
        lw.attach(tuned if wrapped else host, experts, lw.Sum())
    lw.attach(tuned.unload(), experts, lw.Sum())


def failing_attachments(host: Any) -> dict[str, tuple[Any, Any, str]]:
    experts = tiny.experts(host, "llama")
    narrow = tiny.model("llama", hidden_size=16, head_dim=4)
    some = next(iter(experts["ant"].factors.values()))
    stranger = lw.Expert("odd", {"model.layers.9.mlp.up_proj": some})
    linear = lw.LoraFactors(torch.ones(1, 48), torch.ones(32, 1), 1.0)
    return {
        "shape": (experts | {"odd": tiny.expert(narrow, ["q_proj"])}, lw.Sum(), "maps 32 to 32 features"),
        "stranger": (experts | {"odd": stranger}, lw.Sum(), "do not exist there, the first is 'model.layers.9"),
        "unknown name": (experts, lw.Linear({"ent": 1.0}), "unknown expert 'ent'; did you mean 'ant'"),
        "zero sum": (experts, lw.Linear({"ant": 1.0, "bee": -1.0}), "sum to 0"),
        "an empty expert": (experts | {"odd": lw.Expert("odd", {})}, lw.Sum(), "'odd' .* has no LoRA in any module"),
        "no experts": ({}, lw.Sum(), "at least one"),
        "norm": ({"odd": lw.Expert("odd", {"model.norm": some})}, lw.Sum(), "RMSNorm"),
        "embedding as linear": (
            {"odd": lw.Expert("odd", {"model.embed_tokens": linear})},
            lw.Sum(),
            "another kind",
        ),
    }


@pytest.mark.parametrize("case", failing_attachments(tiny.model("llama")))
def test_a_failed_attach_changes_nothing(case: str) -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    before, bare = Snapshot(host), tiny.logits(host, inputs)
    experts, policy, message = failing_attachments(host)[case]
    with pytest.raises(lw.LoraweaveError, match=message) as error:
        lw.attach(host, experts, policy)
    assert "\n" not in str(error.value)
    before.check()
    assert torch.equal(tiny.logits(host, inputs), bare)


def test_whatever_fails_the_model_is_whole() -> None:
    host = tiny.model("llama")
    before = Snapshot(host)
    for broken in ("mole", lw.MoLE, 3):
        with pytest.raises((lw.LoraweaveError, AttributeError, TypeError)):
            lw.attach(host, tiny.experts(host, "llama"), broken)  # type: ignore[arg-type]
        before.check()
