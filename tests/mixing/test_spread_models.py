"""Models whose parts accelerate spreads over devices and moves in from memory or disk when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
import tiny


def spread(architecture: str, where: str, folder: Path) -> Any:
    """A model that accelerate offloads, piece by piece."""
    from accelerate import cpu_offload, disk_offload, dispatch_model

    host = tiny.model(architecture)
    if where == "cpu":
        return cpu_offload(host, torch.device("cpu"))
    if where == "disk":
        return disk_offload(host, str(folder), torch.device("cpu"))
    parts = {name: "disk" if name == "lm_head" else "cpu" for name, _ in host.named_children()}
    parts |= {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu"}
    parts |= {"model.rotary_emb": "cpu"}
    parts.pop("model", None)
    return dispatch_model(host, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
@pytest.mark.parametrize("policy", [lw.Sum(), lw.MoLE(), lw.MoLE("matrix", evidence="outputs")], ids=repr)
def test_a_spread_model_mixes_as_a_whole_one(where: str, policy: Any, tmp_path: Path) -> None:
    inputs = tiny.batch("llama")
    whole = tiny.randomize(tiny.attached("llama", policy))
    expected, bare = tiny.logits(whole.model, inputs), tiny.logits(tiny.model("llama"), inputs)
    host = spread("llama", where, tmp_path)
    mixture = tiny.randomize(lw.attach(host, tiny.experts(tiny.model("llama"), "llama"), policy))
    assert all(not layer.bank.A.is_meta for layer in mixture.layers.values())
    assert_close(tiny.logits(host, inputs), expected, atol=1e-6, rtol=1e-6)
    with mixture.only("ant"), whole.only("ant"):
        assert_close(tiny.logits(host, inputs), tiny.logits(whole.model, inputs), atol=1e-6, rtol=1e-6)
    if mixture.gates:
        host(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for name, p in mixture.gate_parameters() if name.endswith("/e"))
    elif where == "cpu":
        with pytest.raises(lw.LoraweaveError, match="not a plain float matrix"):
            mixture.fold()
    mixture.detach()
    assert_close(tiny.logits(host, inputs), bare, atol=1e-6, rtol=1e-6)
