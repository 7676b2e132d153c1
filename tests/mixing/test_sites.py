"""Which modules share a gate, for each granularity and architecture."""

from __future__ import annotations

from typing import Any

import pytest

import loraweave as lw
import tiny


def layout(
    architecture: str, granularity: Any, targets: Any = None, pooling: Any = "token", **options: Any
) -> dict[str, list[str]]:
    """Site name -> its members."""
    host = tiny.model(architecture)
    one = tiny.expert(host, targets or tiny.ARCHITECTURES[architecture].targets, 1)
    mixture = lw.attach(host, {"a": one, "b": one}, lw.MoLE(granularity, pooling=pooling), **options)
    return {site.name: led(site.plan.members) for site in mixture.sites}


def led(paths: Any) -> list[str]:
    """The leader, and the others in any order."""
    return [paths[0], *sorted(paths[1:])]


def inside(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


LLAMA = [f"model.layers.{n}" for n in (0, 1)]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def test_llama() -> None:
    parts = {b: (inside(f"{b}.self_attn", *ATTENTION), inside(f"{b}.mlp", *MLP)) for b in LLAMA}
    whole = [path for attention, mlp in parts.values() for path in attention + mlp]
    assert layout("llama", "matrix") == {path: [path] for path in whole}
    assert layout("llama", "layer") == {
        name: led(paths)
        for b, (attention, mlp) in parts.items()
        for name, paths in ((f"{b}.self_attn", attention), (f"{b}.mlp", mlp))
    }
    assert layout("llama", "block") == {b: led(attention + mlp) for b, (attention, mlp) in parts.items()}
    assert layout("llama", "network") == {"model": led(whole)}


def t5_block(stack: str, n: int) -> tuple[dict[str, list[str]], list[str]]:
    """Layers of a T5 block without the keys and values of cross-attention, and these."""
    b, cross, last = f"{stack}.block.{n}", [], 1
    layers = {f"{b}.layer.0": inside(f"{b}.layer.0.SelfAttention", "q", "k", "v", "o")}
    if stack == "decoder":
        other, last = f"{b}.layer.1.EncDecAttention", 2
        layers[f"{b}.layer.1"], cross = inside(other, "q", "o"), inside(other, "k", "v")
    layers[f"{b}.layer.{last}"] = inside(f"{b}.layer.{last}.DenseReluDense", "wi", "wo")
    return layers, cross


def test_t5() -> None:
    blocks = {(stack, n): t5_block(stack, n) for stack in ("encoder", "decoder") for n in (0, 1)}
    by_layer: dict[str, list[str]] = {}
    by_block: dict[str, list[str]] = {}
    network: dict[str, list[str]] = {"encoder": [], "decoder": [], "cross": []}
    for (stack, n), (layers, cross) in blocks.items():
        name = f"{stack}.block.{n}"
        by_layer |= layers
        by_block[name] = [path for paths in layers.values() for path in paths]
        network[stack] += by_block[name]
        if cross:
            by_layer[f"{name}.layer.1:cross"] = by_block[f"{name}:cross"] = cross
            network["cross"] += cross
    assert set(layout("t5", "matrix")) == {path for paths in network.values() for path in paths}
    for granularity, expected in (("layer", by_layer), ("block", by_block), ("network", network)):
        assert layout("t5", granularity) == {name: led(paths) for name, paths in expected.items()}


def test_t5_decoders_that_decide_ahead() -> None:
    """Keys of cross-attention lead the layer, block or decoder that they stand in; the encoder is as ever."""
    blocks = {(stack, n): t5_block(stack, n) for stack in ("encoder", "decoder") for n in (0, 1)}
    by_layer: dict[str, list[str]] = {}
    by_block: dict[str, list[str]] = {}
    network: dict[str, list[str]] = {"encoder": [], "decoder": []}
    for (stack, n), (layers, cross) in blocks.items():
        for name, paths in layers.items():
            by_layer[name] = cross + paths if cross and name.endswith("layer.1") else paths
        by_block[f"{stack}.block.{n}"] = cross + [path for paths in layers.values() for path in paths]
        network[stack] += by_block[f"{stack}.block.{n}"]
    for granularity, expected in (("layer", by_layer), ("block", by_block), ("network", network)):
        assert layout("t5", granularity, pooling="auto") == {name: led(paths) for name, paths in expected.items()}
    assert layout("t5", "matrix", pooling="auto") == layout("t5", "matrix")
    without = layout("t5", "block", ["SelfAttention.q", "EncDecAttention.q"], pooling="auto")
    assert without == layout("t5", "block", ["SelfAttention.q", "EncDecAttention.q"])


@pytest.mark.parametrize(
    ("architecture", "block"),
    [
        ("bart", "model.decoder.layers.1"),
        ("whisper", "model.decoder.layers.1"),
        ("gpt2", "transformer.h.1"),
        ("qwen3", "model.layers.1"),
        ("bert", "bert.encoder.layer.1"),
        ("albert", "albert.encoder.albert_layer_groups.0"),
    ],
)
def test_blocks_of_other_models(architecture: str, block: str) -> None:
    sites = layout(architecture, "block")
    assert block in sites
    blocks = {"bart": 6, "whisper": 6, "albert": 1}.get(architecture, 2)
    assert len(sites) == blocks, list(sites)
    assert sum(name.endswith(":cross") for name in sites) == (2 if blocks == 6 else 0)
    for name, members in sites.items():
        assert all(member.startswith(name.removesuffix(":cross")) for member in members)
        crossed = [m for m in members if "encoder_attn.k_proj" in m or "encoder_attn.v_proj" in m]
        assert crossed == (members if name.endswith(":cross") else [])


@pytest.mark.parametrize("architecture", tiny.EVERY)
@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_every_module_is_in_one_site_led_by_who_runs_first(architecture: str, granularity: Any) -> None:
    host = tiny.model(architecture)
    ran: list[str] = []
    mixture = lw.attach(host, tiny.experts(host, architecture), lw.MoLE(granularity))
    for path, layer in mixture.layers.items():
        layer.register_forward_pre_hook(lambda _, __, path=path: ran.append(path))
    tiny.logits(host, tiny.batch(architecture))
    members = [path for site in mixture.sites for path in site.plan.members]
    assert sorted(members) == sorted(mixture.layers)
    assert any(site.plan.ahead for site in mixture.sites) == (
        architecture in ("t5", "bart", "whisper") and granularity != "matrix"
    )
    for site in mixture.sites:
        if not site.plan.ahead:
            assert min(site.plan.members, key=ran.index) == site.plan.members[0]


def test_only_some_targets() -> None:
    sites = layout("llama", "block", ["v_proj", "down_proj"])
    assert sites == {b: [f"{b}.self_attn.v_proj", f"{b}.mlp.down_proj"] for b in LLAMA}
    assert layout("t5", "block", ["EncDecAttention.k"]) == {
        f"decoder.block.{n}": [f"decoder.block.{n}.layer.1.EncDecAttention.k"] for n in (0, 1)
    }


def test_modules_outside_of_blocks_stand_alone() -> None:
    for granularity in ("layer", "block", "network"):
        sites = layout("llama", granularity, ["embed_tokens", "q_proj", "lm_head"])
        assert sites["model.embed_tokens"] == ["model.embed_tokens"]
        assert sites["lm_head"] == ["lm_head"]


def test_blocks_that_the_user_names() -> None:
    sites = layout("llama", "block", blocks=["LlamaMLP", "model.layers.0.self_attn"])
    assert sites["model.layers.1.mlp"] == led(inside("model.layers.1.mlp", *MLP))
    assert sites["model.layers.0.self_attn"] == led(inside("model.layers.0.self_attn", *ATTENTION))
    assert sites["model.layers.1.self_attn.q_proj"] == ["model.layers.1.self_attn.q_proj"], "in no block"
    with pytest.raises(lw.LoraweaveError, match="'LamaMLP' is neither a module path nor a module class"):
        layout("llama", "block", blocks=["LamaMLP"])


def test_a_leader_that_runs_late_is_an_error_not_a_wrong_answer() -> None:
    """Where a model calls its modules in another order than it registers them."""
    host = tiny.model("llama")
    mlp = host.model.layers[0].mlp
    mlp._modules = {name: mlp._modules[name] for name in ("down_proj", "gate_proj", "up_proj", "act_fn")}
    mixture = lw.attach(host, {"a": tiny.expert(host, MLP, 1)}, lw.MoLE("layer"))
    for _ in range(2):
        with pytest.raises(lw.LoraweaveError, match=r"has not run in this pass.*granularity='matrix'"):
            tiny.logits(host, tiny.batch("llama"))
    mixture.policy = lw.MoLE("matrix")
    tiny.logits(host, tiny.batch("llama"))
