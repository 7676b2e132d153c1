"""``torch.compile`` of a model with a mixture: one graph, the same result."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

import loraweave as lw
import tiny

POLICIES = {
    "sum": lw.Sum(),
    "token": lw.MoLE(),
    "matrix": lw.MoLE("matrix", gate_form="full", normalization="layer"),
    "mean": lw.MoLE(pooling="mean"),
    "top2": lw.MoLE(activation="topk", k=2, pooling="mean", scale=1.0),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(name: str, backend: str) -> None:
    mixture = tiny.randomize(tiny.attached("llama", POLICIES[name]))
    inputs = tiny.batch("llama")
    expected = tiny.logits(mixture.model, inputs)
    fast = torch.compile(mixture.model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_close(fast(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
        other = tiny.batch("llama", (7, 6, 2), seed=1)
        got = fast(**other, use_cache=False).logits
    assert_close(got, tiny.logits(mixture.model, other), atol=1e-5, rtol=1e-4)


def test_one_graph() -> None:
    compiled("token", "eager")


@pytest.mark.slow
def test_one_graph_where_the_first_gate_chooses(monkeypatch: Any) -> None:
    monkeypatch.setitem(POLICIES, "preselect", lw.MoLE(preselect=2))
    compiled("preselect", "eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("clang") is None, reason="no C compiler")
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_code(name: str) -> None:
    compiled(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "top2"])
def test_a_change_of_parameters_or_a_mask_of_a_size_seen_before_compiles_nothing(name: str) -> None:
    """Of a mask only the number of experts that it keeps is compiled in."""
    mixture = tiny.randomize(tiny.attached("llama", POLICIES[name]))
    inputs = tiny.batch("llama")
    fast = torch.compile(mixture.model, fullgraph=True, backend="eager")

    def check() -> None:
        with torch.no_grad():
            got = fast(**inputs, use_cache=False).logits
        assert_close(got, tiny.logits(mixture.model, inputs), atol=1e-5, rtol=1e-4)

    def change(seed: int) -> None:
        tiny.randomize(mixture, seed)
        check()

    def through(*masks: tuple[str, ...]) -> None:
        for names in masks:
            with mixture.only(*names):
                check()
            check()

    check()
    check()
    through(("ant", "bee"), ("ant",), ("ant", "cat"))
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    change(1)
    through(("ant", "bee"), ("ant",), ("bee", "cat"), ("cat",))
    change(2)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_compiled_training() -> None:
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE()))
    inputs = tiny.batch("llama")

    def step(model: Any) -> dict[str, torch.Tensor]:
        mixture.model.zero_grad(set_to_none=True)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in mixture.gate_parameters() if p.grad is not None}

    expected = step(mixture.model)
    got = step(torch.compile(mixture.model, backend="aot_eager"))
    for name, g in expected.items():
        assert_close(got[name], g, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sum", "token", "matrix", "prompt", "top2", "preselect"])
def test_decoding_with_a_static_cache_is_one_graph_for_prompts_and_one_for_steps(name: str) -> None:
    prompted = {
        "prompt": lw.MoLE(pooling="prompt"),
        "top2": lw.MoLE(activation="topk", k=2, pooling="prompt"),
        "preselect": lw.MoLE(preselect=2),
    }
    mixture = tiny.randomize(tiny.attached("llama", (POLICIES | prompted)[name]))
    inputs = {key: value for key, value in tiny.batch("llama", (6, 2, 4), "left").items() if key != "position_ids"}
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = mixture.model.generate(**inputs, **options)
    model: Any = mixture.model
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    try:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), expected)
            assert counters["stats"]["unique_graphs"] == 2
    finally:
        del model.forward
