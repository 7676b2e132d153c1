"""What is read equals what peft itself makes of the same files."""

from __future__ import annotations

import hashlib
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_config, tiny

from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.experts.reader import fingerprint, read_expert, read_experts


def peft_factors(kind, folder):
    """Module -> (A, B, scale) of the adapter as peft's own layers hold it."""
    model = peft.PeftModel.from_pretrained(tiny(kind), folder)
    factors = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            if "default" in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            factors[name] = a.detach(), b.detach(), layer.scaling["default"]
    return factors


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6, "v_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 1, r"layers\.0\..*": 32}},
    "both_rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.layers.0.*q_proj": 3}},
    "first_match_wins": {"rank_pattern": {"(q|v)_proj": 2, "q_proj": 7}},
    "unescaped_dot": {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "self.attn.v_proj": 5}},
    "anchored_misses": {"alpha_pattern": {"^self_attn.q_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_factors_equal_pefts(make_adapter, case):
    folder = make_adapter("llama", **CASES[case])
    _assert_same(read_expert(folder), peft_factors("llama", folder))


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_other_architectures(make_adapter, kind):
    folder = make_adapter(kind)
    _assert_same(read_expert(folder), peft_factors(kind, folder))


def test_embeddings(make_adapter):
    folder = make_adapter("t5", target_modules=["shared", "q"])
    expert = read_expert(folder)
    _assert_same(expert, peft_factors("t5", folder))
    assert expert.factors["shared"].embedding
    assert expert.factors["shared"].A.shape == (4, 40)
    assert not expert.factors["encoder.block.0.layer.0.SelfAttention.q"].embedding


def test_base_weights_saved_beside_an_embedding_are_mentioned(make_adapter):
    folder = make_adapter("llama", target_modules=["embed_tokens", "lm_head"])
    with pytest.warns(LoraweaveWarning, match=r"base's own weights \(.*lm_head\.base_layer\.weight, .*embed_tokens"):
        expert = read_expert(folder)
    assert sorted(expert.factors) == ["lm_head", "model.embed_tokens"]


def _assert_same(expert, expected):
    assert expert.factors.keys() == expected.keys()
    for module, (a, b, scale) in expected.items():
        factor = expert.factors[module]
        assert torch.equal(factor.A, a)
        assert torch.equal(factor.B, b)
        assert math.isclose(factor.scale, scale, rel_tol=1e-12), module


def test_scale_by_hand(make_adapter):
    plain, stable = (
        make_adapter(name="a", r=4, lora_alpha=6),
        make_adapter(name="b", r=4, lora_alpha=6, use_rslora=True),
    )
    assert {factor.scale for factor in read_expert(plain).factors.values()} == {1.5}
    assert {factor.scale for factor in read_expert(stable).factors.values()} == {3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(make_adapter, dtype):
    factors = read_expert(make_adapter(dtype=dtype)).factors
    assert {tensor.dtype for factor in factors.values() for tensor in (factor.A, factor.B)} == {dtype}


def test_names_and_hash(make_adapter, tmp_path):
    folder = make_adapter(name="skill")
    expert = read_expert(f"{folder}/")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    assert (expert.name, expert.source, expert.revision) == ("skill", f"{folder}/", None)
    assert (
        expert.sha256 == hashlib.sha256(weights.read_bytes() + config.read_bytes()).hexdigest() == fingerprint(folder)
    )
    assert read_expert(folder, "other").name == "other"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert fingerprint(folder) != expert.sha256


def test_base_is_reported(make_adapter):
    folder = make_adapter()
    edit_config(folder, base_model_name_or_path="someone/base")
    assert read_expert(folder).base == "someone/base"


def test_older_key_styles(make_adapter):
    """An adapter's name before ``.weight`` (older peft), and no prefix (other tools)."""
    folder = make_adapter("t5", target_modules=["q", "shared"])
    expected = read_expert(folder).factors
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)

    def old(key):
        return key.replace(".weight", ".default.weight") if key.endswith(".weight") else key + ".default"

    for rename in (old, lambda key: key.removeprefix("base_model.model.")):
        save_file({rename(key): tensor for key, tensor in tensors.items()}, path)
        factors = read_expert(folder).factors
        assert factors.keys() == expected.keys()
        assert all(torch.equal(factors[module].A, expected[module].A) for module in expected)
        assert factors["shared"].embedding


def test_several_in_parallel_keep_their_order(make_adapter, tmp_path):
    first = make_adapter(name="e0")
    sources = {"e0": first}
    for i in range(1, 9):
        sources[f"e{i}"] = shutil.copytree(first, tmp_path / f"copy{i}")
        edit_config(sources[f"e{i}"], lora_alpha=i)
    experts = read_experts(sources, threads=4)
    assert [expert.name for expert in experts] == list(sources)
    assert [next(iter(expert.factors.values())).scale for expert in experts[1:]] == [i / 4 for i in range(1, 9)]
    (tmp_path / "copy3" / "adapter_model.safetensors").unlink()
    with pytest.raises(LoraweaveError, match=r"copy3.adapter_model\.safetensors: file is missing"):
        read_experts(sources)


def test_nothing_to_read():
    assert read_experts({}) == []


def test_converted_pissa_is_an_ordinary_lora(make_adapter, tmp_path):
    """peft converts on request; the rank doubles and the initialisation is written as an ordinary one."""
    model = tiny("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj"])
    )
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    trained = layer.base_layer.weight + layer.get_delta_weight("default")
    wrapped.save_pretrained(tmp_path / "raw")
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(LoraweaveError, match=r"adapter_config\.json: field init_lora_weights is 'pissa'.*convert it"):
        read_expert(tmp_path / "raw")
    factor = read_expert(tmp_path / "plain").factors["model.layers.0.self_attn.q_proj"]
    assert factor.rank == 4
    delta = factor.scale * factor.B @ factor.A
    assert torch.allclose(before["model.layers.0.self_attn.q_proj.weight"] + delta, trained, atol=1e-5)
