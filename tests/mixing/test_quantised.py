"""The base module is only ever called: quantised ones work, and cannot be folded into."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
import tiny


class Int8Linear(nn.Module):
    """Weights in eight bits; nothing in it but ``forward`` can be used, as with real quantised layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ (self.weight.to(x.dtype) * self.scale).T
        return out


def quantised(architecture: str) -> Any:
    host = tiny.model(architecture)
    for path, module in list(host.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            parent, _, leaf = path.rpartition(".")
            setattr(host.get_submodule(parent), leaf, Int8Linear(module))
    return host


@pytest.mark.parametrize("policy", [lw.Sum(), lw.MoLE(), lw.MoLE("matrix", evidence="hidden")])
def test_quantised_base(policy: Any, tmp_path: Path) -> None:
    inputs, plain = tiny.batch("llama"), tiny.model("llama")
    experts = tiny.experts(plain, "llama")
    host = quantised("llama")
    bare = tiny.logits(host, inputs)
    mixture = tiny.randomize(lw.attach(host, experts, policy))
    decisions = tiny.Decisions(mixture, inputs)
    slow = tiny.slow_mixture(quantised("llama"), experts, decisions)
    assert_close(decisions.logits, tiny.logits(slow, inputs), atol=2e-5, rtol=1e-5)
    if mixture.gates:
        host(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad.abs().max() > 0 for name, p in mixture.gate_parameters() if name.endswith("/e"))
    else:
        with pytest.raises(lw.LoraweaveError, match=r"cannot fold into 'model.layers.0.self_attn.q_proj'.*quantised"):
            mixture.fold()
        assert_close(tiny.logits(host, inputs), decisions.logits, atol=0, rtol=0)
        mixture.export_lora(tmp_path / "lora")
    mixture.detach()
    assert torch.equal(tiny.logits(host, inputs), bare)


def test_torch_dynamic_quantisation() -> None:
    inputs, plain = tiny.batch("llama"), tiny.model("llama")
    experts = tiny.experts(plain, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    bare = tiny.logits(host, inputs)
    mixture = lw.attach(host, experts, lw.Sum())
    out = tiny.logits(host, inputs)
    slow = tiny.slow_mixture(tiny.model("llama"), experts, lambda _: torch.ones(1, 1, 3))
    expected = tiny.logits(slow, inputs)
    assert (out - expected).norm() < 0.1 * expected.norm(), "what quantisation itself costs, and no more"
    mixture.policy = lw.MoLE(scale="experts")
    assert_close(tiny.logits(host, inputs), out, atol=1e-3, rtol=1e-3)
    mixture.policy = lw.Sum()
    with pytest.raises(lw.LoraweaveError, match="not a plain float matrix"):
        mixture.fold()
    mixture.detach()
    assert torch.equal(tiny.logits(host, inputs), bare)


def by_bitsandbytes(host: Any, bits: int) -> None:
    """4-bit and 8-bit layers in place of the linear ones, as transformers puts them there."""
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(host.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            shape = (module.in_features, module.out_features, False)
            made = (
                bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                if bits == 4
                else bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            )
            made.load_state_dict(module.state_dict())
            parent, _, leaf = path.rpartition(".")
            setattr(host.get_submodule(parent), leaf, made.to("cpu"))


def by_torchao(host: Any, _: int) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(host.model, quantization.Int8WeightOnlyConfig())


REAL = {
    "bitsandbytes-4": (by_bitsandbytes, 4),
    "bitsandbytes-8": (by_bitsandbytes, 8),
    "torchao-8": (by_torchao, 8),
}


@pytest.mark.parametrize("policy", [lw.Sum(), lw.MoLE(), lw.MoLE("matrix", evidence="outputs")])
@pytest.mark.parametrize("kind", REAL)
def test_real_quantised_bases(kind: str, policy: Any) -> None:
    """A slow loop over the quantised layer's output plus every expert's delta."""
    quantise, bits = REAL[kind]
    inputs, plain = tiny.batch("llama"), tiny.model("llama")
    experts, hosts = tiny.experts(plain, "llama"), [tiny.model("llama") for _ in range(2)]
    for host in hosts:
        quantise(host, bits)
    bare = tiny.logits(hosts[0], inputs)
    assert (bare - tiny.logits(plain, inputs)).abs().max() > 1e-3, "it is quantised"
    mixture = tiny.randomize(lw.attach(hosts[0], experts, policy))
    decisions = tiny.Decisions(mixture, inputs)
    slow = tiny.slow_mixture(hosts[1], experts, decisions)
    # Eight bits of bitsandbytes round the input too, so that rounding errors may grow into one of its steps.
    loose = {"atol": 0.05, "rtol": 0.05} if kind == "bitsandbytes-8" else {"atol": 2e-5, "rtol": 1e-5}
    assert_close(decisions.logits, tiny.logits(slow, inputs), **loose)
    assert (decisions.logits - bare).abs().max() > 0.1
    if mixture.gates:
        hosts[0](**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad.abs().max() > 0 for name, p in mixture.gate_parameters() if name.endswith("/e"))
    else:
        with pytest.raises(lw.LoraweaveError, match=r"cannot fold into .*quantised"):
            mixture.fold()
    mixture.detach()
    assert torch.equal(tiny.logits(hosts[0], inputs), bare)


def test_a_fold_that_fails_half_way_changes_nothing() -> None:
    inputs, host = tiny.batch("llama"), tiny.model("llama")
    experts = tiny.experts(host, "llama")
    host.model.layers[1].mlp.down_proj = Int8Linear(host.model.layers[1].mlp.down_proj)
    mixture = lw.attach(host, experts, lw.Sum())
    before = tiny.logits(host, inputs)
    with pytest.raises(lw.LoraweaveError, match=r"layers.1.mlp.down_proj"):
        mixture.fold()
    assert torch.equal(tiny.logits(host, inputs), before)
