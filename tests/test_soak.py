"""Round after round of everything a long-running process does leave nothing behind."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch

import loraweave as lw
import tiny

ROUNDS = 30
POLICIES = [
    lw.Sum(),
    lw.Linear(),
    lw.MoLE(),
    lw.MoLE("matrix", activation="topk", pooling="prompt"),
    lw.Arrow(k=2),
    lw.LoGo(k=2),
]


def living() -> Counter[str]:
    """How many objects of each kind are alive."""
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects())


@pytest.mark.slow
def test_nothing_grows() -> None:
    host = tiny.model("llama")
    experts = tiny.experts(host, "llama")
    inputs = {key: tiny.batch("llama", (5, 3), side="left")[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    bare = host.generate(**inputs, **settings)
    parameters = dict(host.named_parameters())

    def round_trip(number: int) -> None:
        mixture = tiny.randomize(lw.attach(host, experts, POLICIES[number % len(POLICIES)]), seed=number)
        host.generate(**inputs, **settings)
        for policy in POLICIES:
            mixture.policy = policy
            with mixture.only(tiny.NAMES[number % 3]), mixture.record():
                host(**inputs)
            with mixture.rows([{"ant": 1.0}, None]):
                host(**inputs)
        mixture.policy = lw.MoLE()
        host(**inputs, labels=inputs["input_ids"]).loss.backward()
        mixture.policy = lw.Sum()
        mixture.fold()
        mixture.unfold()
        with pytest.raises(lw.LoraweaveError):
            mixture.rows([{"nobody": 1.0}]).__enter__()
        mixture.detach()

    for number in range(12):
        round_trip(number)
    before = living()
    for number in range(ROUNDS):
        round_trip(number)
    after = living()
    grown = {kind: count - before[kind] for kind, count in after.items() if count >= before[kind] + ROUNDS}
    assert not grown, f"objects left behind by {ROUNDS} rounds: {grown}"
    assert torch.equal(host.generate(**inputs, **settings), bare)
    assert all(p is parameters[name] and p.requires_grad for name, p in host.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
