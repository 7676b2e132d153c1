"""What changes between calls of a compiled model does not compile it again; the first mask does, the next do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(mixture: lw.Mixture) -> tuple[Any, list[int]]:
    """The model in one graph, and a list that grows by one entry with every compilation."""
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    return torch.compile(mixture.model, fullgraph=True, backend=backend), compilations


def check(fast: Any, mixture: lw.Mixture, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        got: torch.Tensor = fast(**inputs, use_cache=False).logits
    assert_close(got, tiny.logits(mixture.model, inputs), atol=1e-5, rtol=1e-4)
    return got


POLICIES = {
    "token": lw.MoLE(),
    "mean": lw.MoLE(pooling="mean"),
    "top2": lw.MoLE(activation="topk", k=2, pooling="mean"),
    "sigmoid": lw.MoLE(activation="sigmoid"),
    "linear": lw.MoLE(activation="linear"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_new_gate_values_do_not_compile_again(name: str) -> None:
    mixture, inputs = tiny.randomize(tiny.attached("llama", POLICIES[name])), tiny.batch("llama")
    fast, compilations = compiled(mixture)
    before = check(fast, mixture, inputs)
    assert len(compilations) == 1
    tiny.randomize(mixture, seed=1)
    assert not torch.allclose(check(fast, mixture, inputs), before), "other gates say something else"
    assert len(compilations) == 1


@pytest.mark.slow
def test_masks() -> None:
    mixture, inputs = tiny.randomize(tiny.attached("llama", lw.MoLE())), tiny.batch("llama")
    fast, compilations = compiled(mixture)
    check(fast, mixture, inputs)
    for names in (("ant", "bee"), ("bee", "cat"), ("cat", "ant")):
        with mixture.only(*names):
            check(fast, mixture, inputs)
        check(fast, mixture, inputs)
    assert len(compilations) == 2, "one without a mask, one with"


@pytest.mark.slow
def test_linear_weights() -> None:
    mixture, inputs = tiny.attached("llama", lw.Linear({"ant": 3.0, "bee": 2.0, "cat": 1.0})), tiny.batch("llama")
    fast, compilations = compiled(mixture)
    check(fast, mixture, inputs)
    for ant in (1.0, 0.5, 4.0):
        mixture.policy = lw.Linear({"ant": ant, "bee": 2.0, "cat": 1.0})
        check(fast, mixture, inputs)
    assert len(compilations) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "token", "top2"])
def test_parts_that_are_kept_out_of_the_graph_use_what_its_gates_decide(name: str) -> None:
    policies = {
        "mean": lw.MoLE(pooling="mean"), "token": lw.MoLE(),
        "top2": lw.MoLE(activation="topk", k=2, pooling="mean"),
    }  # fmt: skip
    mixture = tiny.randomize(tiny.attached("llama", policies[name], torch.float64))
    for block in mixture.model.model.layers:
        block.mlp.forward = torch.compiler.disable(block.mlp.forward)
    some = [tiny.batch("llama", seed=seed) for seed in range(2)]
    expected = [tiny.logits(mixture.model, inputs) for inputs in some]
    compiled = torch.compile(mixture.model, backend="eager")
    for inputs, wanted in zip(some, expected, strict=True):
        with torch.no_grad():
            # Dynamo reorders a sum here and there, and Llama's softmax and norms round to float32 in any precision.
            assert_close(compiled(**inputs).logits, wanted, atol=2e-6, rtol=1e-5)
