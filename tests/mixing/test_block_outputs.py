"""``mix="outputs"`` against running each block by hand, once bare and once per expert (MoLE Eq. 12-13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
import tiny


class SlowBlock(nn.Module):
    """``O = F + sum_i g_i (F_i - F)``, ``g`` from the changes ``F_i - F`` (Eq. 9-11)."""

    def __init__(self, block: nn.Module, switch: Callable[[int | None], None], decide: Callable[[Tensor], Tensor]):
        super().__init__()
        self.block, self.switch, self.decide = block, switch, decide
        self.g: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for expert in (None, 0, 1, 2):
            self.switch(expert)
            outputs.append(self.block(hidden, *args, **kwargs))
        self.switch(None)
        bare, *others = [out[0] if isinstance(out, tuple) else out for out in outputs]
        changes = torch.stack([out - bare for out in others])
        self.g = self.decide(changes)
        mixed = bare + sum(self.g[..., i, None] * changes[i] for i in range(3))
        return (mixed, *outputs[0][1:]) if isinstance(outputs[0], tuple) else mixed


def decide(gate: Any, mask: Tensor | None, changes: Tensor) -> Tensor:
    """Weights ``[rows, tokens or 1, E]`` from changes ``[E, rows, tokens, d]``, token by token."""
    rows, tokens = changes.shape[1:3]
    g = torch.empty(rows, tokens if mask is None else 1, 3, dtype=changes.dtype)
    for row in range(rows):
        vectors = [torch.cat([changes[i, row, t] for i in range(3)]) for t in range(tokens)]
        if mask is not None:
            real = [v for t, v in enumerate(vectors) if mask[row, t]]
            vectors = [torch.stack(real).mean(0)]
        for t, v in enumerate(vectors):
            logits = (v / v.norm()) @ gate.e.detach().double().flatten(0, 1)
            g[row, t] = 3 * torch.softmax(logits / gate.log_temperature.detach().double().exp(), -1)
    return g


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_blocks_run_once_per_expert(architecture: str) -> None:
    inputs = tiny.batch(architecture)
    policy = lw.MoLE(mix="outputs", evidence="outputs", normalization="l2", gate_form="full", scale="experts")
    mixture = tiny.randomize(tiny.attached(architecture, policy, torch.float64))
    assert [s.name for s in mixture.sites if s.gate is not None] == [
        s.name for s in mixture.sites if not s.name.endswith(":cross")
    ]
    with mixture.record() as seen:
        out = tiny.logits(mixture.model, inputs)
    on: dict[str, int | None] = {"expert": None}
    one_hot = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(1, 1, 3, dtype=torch.float64)

    def weights(_: str) -> Tensor:
        return zero if on["expert"] is None else one_hot[on["expert"]].view(1, 1, 3)

    bare = tiny.model(architecture, torch.float64)
    slow = tiny.slow_mixture(bare, tiny.experts(bare, architecture), weights)
    blocks = {}
    for name, gate in mixture.gates.items():
        mask = inputs["attention_mask"] if name.startswith("encoder") else None
        parent, _, leaf = name.rpartition(".")
        blocks[name] = SlowBlock(
            slow.get_submodule(name),
            lambda expert: on.update(expert=expert),
            lambda changes, gate=gate, mask=mask: decide(gate, mask, changes),
        )
        slow.get_submodule(parent)._modules[leaf] = blocks[name]
    expected = slow(**inputs, use_cache=False).logits
    for name, block in blocks.items():
        assert_close(seen.weights[name], block.g.float(), atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_one_expert_at_unit_scale_is_the_same_in_both_modes() -> None:
    host, inputs = tiny.model("llama", torch.float64), tiny.batch("llama")
    one = {"only": tiny.expert(host, tiny.ARCHITECTURES["llama"].targets, 3)}
    mixture = lw.attach(host, one, lw.MoLE(mix="outputs", evidence="outputs", gate_form="full", scale=1.0))
    outputs = tiny.logits(host, inputs)
    mixture.policy = lw.Sum()
    assert_close(outputs, tiny.logits(host, inputs), atol=1e-9, rtol=1e-9)


def test_modules_outside_of_blocks_are_gated_by_themselves() -> None:
    host, inputs = tiny.model("llama", torch.float64), tiny.batch("llama")
    targets = [("embed_tokens", "q_proj"), ("lm_head", "down_proj", "q_proj"), ("lm_head",)]
    experts = {f"e{i}": tiny.expert(host, names, 2, seed=i) for i, names in enumerate(targets)}
    mixture = tiny.randomize(
        lw.attach(host, experts, lw.MoLE(mix="outputs", evidence="outputs", gate_form="full", scale=1.0))
    )
    assert set(mixture.gates) == {"model.layers.0", "model.layers.1", "model.embed_tokens", "lm_head"}
    tiny.logits(host, inputs)
    alone = []
    for name in experts:
        with mixture.only(name):
            alone.append(tiny.logits(host, inputs))
    mixture.policy = lw.Sum()
    for name, out in zip(experts, alone, strict=True):
        with mixture.only(name):
            assert_close(out, tiny.logits(host, inputs), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("target", ["o_proj", "down_proj"])
def test_a_block_whose_first_expert_module_is_not_its_door(target: str) -> None:
    """The gate reads the block's output, whatever width the expert's first module has."""
    host, inputs = tiny.model("llama", num_attention_heads=2, head_dim=8), tiny.batch("llama")
    experts = {f"e{i}": tiny.expert(host, [target], 2, seed=i) for i in range(2)}
    mixture = lw.attach(host, experts, lw.Sum())
    summed = tiny.logits(host, inputs)
    assert (summed - tiny.logits(tiny.model("llama", num_attention_heads=2, head_dim=8), inputs)).abs().max() > 1e-2
    mixture.policy = lw.MoLE(mix="outputs", evidence="outputs", gate_form="full")
    once = tiny.logits(host, inputs)
    tiny.randomize(mixture)
    assert (tiny.logits(host, inputs) - once).abs().max() > 1e-3


def test_options_that_do_not_go_together() -> None:
    for options in ({"granularity": "matrix"}, {"gate_form": "compact"}, {"evidence": "hidden"}):
        with pytest.raises(lw.LoraweaveError, match=r"mix='outputs'.* needs"):
            lw.MoLE(**({"mix": "outputs", "evidence": "outputs", "gate_form": "full"} | options))
