"""The mixture as its user holds it: attach, look inside, swap policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny


@pytest.fixture(scope="module")
def sources(tmp_path_factory: Any) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("experts")
    return {n: lw.write_expert(e, place / n) for n, e in tiny.experts(tiny.model("llama"), "llama").items()}


def test_ways_to_name_experts(sources: dict[str, Path]) -> None:
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    outputs = []
    for given in (
        sources,
        {n: str(p) for n, p in sources.items()},
        list(sources.values()),
        tuple(str(p) + "/" for p in sources.values()),
        {n: lw.read_expert(p, "other name") for n, p in sources.items()},
        [lw.read_expert(p) for p in sources.values()],
    ):
        mixture = lw.attach(host, given, lw.Sum())
        assert mixture.experts == tiny.NAMES
        outputs.append(tiny.logits(host, inputs))
        mixture.detach()
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_order_is_the_users(sources: dict[str, Path]) -> None:
    order = ("cat", "ant", "bee")
    mixture = lw.attach(tiny.model("llama"), {n: sources[n] for n in order})
    assert mixture.experts == order
    assert tuple(e.name for e in mixture.sources) == order
    assert mixture.policy == lw.MoLE(), "the default"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "experts: expected at least one, got none"),
        ([], "experts: expected at least one, got none"),
        ("loras/qa", "expected a mapping of names to sources, or a list of sources, got a single one"),
        ({"a/b": "x"}, "expert name 'a/b': use letters, digits"),
        ({"": "x"}, "expert name ''"),
        (["one/same", "two/same"], "two experts would be called 'same'; give names"),
    ],
)
def test_what_is_wrong_with_experts_is_said(given: Any, message: str) -> None:
    with pytest.raises(lw.LoraweaveError, match=message):
        lw.attach(tiny.model("llama"), given)


def test_record() -> None:
    mixture = tiny.randomize(tiny.attached("t5", lw.MoLE(granularity="network", pooling="auto", scale=1.0)))
    short, long = tiny.batch("t5", (2, 6)), tiny.batch("t5", (5, 5, 5), seed=2)
    with mixture.record() as seen:
        tiny.logits(mixture.model, short)
        one = dict(seen.weights)
        tiny.logits(mixture.model, long)
    assert set(seen.weights) == {"encoder", "decoder"}
    assert seen.weights["encoder"].shape == seen.weights["decoder"].shape == (3, 1, 3)
    assert not any(g.requires_grad for g in seen.weights.values())
    for name, mean in seen.average().items():
        both = [g.reshape(-1, 3) for g in (one[name], seen.weights[name])]
        assert_close(torch.tensor(mean), torch.cat(both).mean(0), atol=1e-6, rtol=1e-5)
        assert sum(mean) == pytest.approx(1.0, abs=1e-5)
    kept = dict(seen.weights)
    tiny.logits(mixture.model, short)
    assert all(seen.weights[name] is g for name, g in kept.items()), "it listens inside its context alone"


def test_record_leaves_padding_out() -> None:
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE()))
    inputs = tiny.batch("llama", (7, 3))
    with mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    mask = inputs["attention_mask"].bool()
    for name, mean in seen.average().items():
        assert_close(torch.tensor(mean), seen.weights[name][mask].mean(0), atol=1e-6, rtol=1e-5)


def test_record_of_constant_weights_and_of_masks() -> None:
    mixture = tiny.attached("llama", lw.Linear({"ant": 3, "bee": 1}))
    with mixture.record() as seen:
        pass
    assert set(map(tuple, seen.average().values())) == {(0.75, 0.25, 0.0)}
    with mixture.only("bee"), mixture.record() as seen:
        pass
    assert set(map(tuple, seen.average().values())) == {(0.0, 1.0, 0.0)}


def test_policies_can_be_swapped() -> None:
    host, inputs = tiny.model("t5"), tiny.batch("t5")
    mixture = lw.attach(host, tiny.experts(host, "t5"), lw.Sum())
    summed = tiny.logits(host, inputs)
    assert not mixture.gates
    keys = set(host.state_dict())
    mixture.policy = lw.MoLE("matrix")
    assert len(mixture.gates) == len(mixture.sites) == len(mixture.layers)
    assert {n for n, _ in mixture.gate_parameters()} >= {f"{path}/e" for path in mixture.layers}
    tiny.randomize(mixture)
    assert not torch.equal(tiny.logits(host, inputs), summed)
    mixture.policy = lw.MoLE(mix="outputs", evidence="outputs", gate_form="full")
    tiny.logits(host, inputs)
    mixture.policy = lw.MoLE()
    fresh = tiny.logits(host, inputs)
    tiny.randomize(mixture)
    mixture.policy = lw.MoLE()
    assert torch.equal(tiny.logits(host, inputs), fresh), "learned gates are dropped"
    mixture.policy = lw.Sum()
    assert torch.equal(tiny.logits(host, inputs), summed)
    assert set(host.state_dict()) == keys


def test_gates_are_part_of_the_model() -> None:
    """So that .to(device), train(), DDP and optimizers find them."""
    mixture = tiny.attached("llama", lw.MoLE())
    inside = {id(p) for p in mixture.model.parameters()}
    assert all(id(p) in inside for _, p in mixture.gate_parameters())
    assert len(dict(mixture.gate_parameters())) == len(list(mixture.gate_parameters()))


def test_repr_says_what_it_is() -> None:
    mixture = tiny.attached("llama", lw.Sum())
    said = repr(mixture)
    assert "LlamaForCausalLM" in said
    assert "ant, bee, cat" in said
    assert "Sum(" in said
    assert "sites=14" in said


def test_experts_that_touch_nothing_of_each_other() -> None:
    """Different targets: evidence of an expert that has no part in a site's first module is zero."""
    host, inputs = tiny.model("llama"), tiny.batch("llama")
    experts = {"a": tiny.expert(host, ["q_proj"], 2), "b": tiny.expert(host, ["down_proj"], 3, seed=1)}
    mixture = lw.attach(host, experts, lw.MoLE(scale=1.0))
    tiny.randomize(mixture)
    with mixture.record() as seen:
        tiny.logits(host, inputs)
    assert all(torch.isfinite(g).all() for g in seen.weights.values())
    host(**inputs).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for _, p in mixture.gate_parameters() if p.grad is not None)


def test_two_models_at_a_time() -> None:
    """Nothing is shared between mixtures but layouts."""
    inputs, other = tiny.batch("llama"), tiny.batch("llama", (4, 7, 7), seed=5)
    one, two = (tiny.randomize(tiny.attached("llama", lw.MoLE(pooling="mean")), seed=i) for i in (1, 2))
    expected = [tiny.logits(m.model, x) for m, x in ((one, inputs), (two, other))]
    with one.only("ant"):
        assert torch.equal(tiny.logits(two.model, other), expected[1])
    assert torch.equal(tiny.logits(one.model, inputs), expected[0])


def test_import_needs_torch_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys, loraweave as lw; lw.attach, lw.load, lw.MoLE, lw.Sum, lw.Linear, lw.LoraweaveError;"
        "print([m for m in ('transformers', 'peft', 'matplotlib', 'pydantic', 'torch._dynamo') if m in sys.modules])"
    )
    paths = {"PYTHONPATH": str(Path(lw.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=paths, check=True)
    assert done.stdout.strip() == "[]"
