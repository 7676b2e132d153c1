"""Reports: the facts, and what is odd."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_config, edit_tensors

from loraweave.errors import LoraweaveError
from loraweave.experts.inspection import inspect
from loraweave.experts.reader import read_expert

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def test_facts(make_adapter):
    folder = make_adapter("llama", task_type="CAUSAL_LM", rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 12})
    edit_config(folder, base_model_name_or_path="someone/base")
    report, expert = inspect(folder), read_expert(folder)
    weights = folder / "adapter_model.safetensors"
    assert (report.source, report.format, report.method) == (str(folder), "peft", "LORA")
    assert (report.base, report.task_type, report.base_class) == ("someone/base", "CAUSAL_LM", None)
    assert report.peft_version == json.loads((folder / "adapter_config.json").read_text())["peft_version"]
    assert report.ranks == {4: 4, 2: 2}
    assert report.alphas == {8: 4, 12: 2}
    assert report.scales == {2.0: 2, 3.0: 2, 4.0: 2}
    assert report.targets == {"down_proj": 2, "q_proj": 2, "v_proj": 2}
    assert report.modules == len(expert.factors) == 6
    assert report.parameters == sum(factor.A.numel() + factor.B.numel() for factor in expert.factors.values())
    assert report.dtypes == {"F32": 12}
    assert report.size == weights.stat().st_size
    assert report.sha256 == expert.sha256
    assert report.metadata == {"format": "pt"}
    assert (report.mixable, report.reason) == (True, None)
    assert report.odd == ["rank differs between modules: 4 in 4, 2 in 2",
                          "scale differs between modules: 3 in 2, 2 in 2, 4 in 2"]  # fmt: skip


def test_an_ordinary_adapter_has_nothing_odd(make_adapter):
    folder = make_adapter()
    edit_config(folder, base_model_name_or_path="someone/base")
    assert inspect(folder).odd == []


def test_the_weight_file_of_a_folder_means_the_folder(make_adapter):
    folder = make_adapter()
    assert inspect(folder / "adapter_model.safetensors") == inspect(folder)


def test_json_ready(make_adapter):
    report = inspect(make_adapter(use_rslora=True, rank_pattern={"v_proj": 2}))
    content = json.loads(json.dumps(report.to_dict()))
    assert content == report.to_dict()
    assert content["ranks"] == {"4": 4, "2": 2}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_rslora": True}, "rank-stabilised (rsLoRA): scale is alpha / sqrt(rank)"),
        ({"lora_alpha": 32}, "alpha / rank = 8 is unusually strong (1 or 2 is usual)"),
        ({"lora_alpha": 32, "use_rslora": True}, "alpha / sqrt(rank) = 16 is unusually strong (1 or 2 is usual)"),
        ({"lora_alpha": 0}, "scale 0: does nothing"),
        ({"lora_alpha": -4}, "scale -1: works against its training"),
        ({"init_lora_weights": True}, "A or B is all zero in 6 of 6 modules (model.layers.0.mlp.down_proj, "
         "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj and 3 more): they do nothing"),
        ({"target_modules": ["q_proj"]}, "targets only attention"),
        ({"target_modules": ["embed_tokens"]}, "targets embeddings: model.embed_tokens"),
        ({"target_modules": ["embed_tokens"]}, "also holds the base's own weights "
         "(base_model.model.model.embed_tokens.base_layer.weight); they are not used"),
        ({"r": 17, "target_modules": ["q_proj"]}, "rank exceeds the module's width in 2 modules "
         "(model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj): more than a full matrix"),
        ({}, "names no base model"),
    ],
)  # fmt: skip
def test_oddities(make_adapter, options, sentence):
    report = inspect(make_adapter(**options))
    assert sentence in report.odd
    assert report.mixable


def test_conv1d(make_adapter):
    report = inspect(make_adapter("gpt2", fan_in_fan_out=True))
    assert "trained with fan_in_fan_out (Conv1D layers, as in GPT-2)" in report.odd
    assert "targets only attention" not in report.odd  # GPT-2 calls projections of both kinds c_proj


def test_mixed_dtypes(make_adapter):
    folder = make_adapter()
    edit_tensors(folder, lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 16).bfloat16()}))
    assert "mixed dtypes: F32 in 11, BF16 in 1" in inspect(folder).odd
    factor = read_expert(folder).factors["model.layers.0.self_attn.q_proj"]
    assert (factor.A.dtype, factor.B.dtype) == (torch.bfloat16, torch.float32)


def test_targets_without_tensors(make_adapter):
    folder = make_adapter()
    edit_config(folder, target_modules=["q_proj", "v_proj", "down_proj", "k_proj", "proj"])
    assert "target_modules names k_proj, proj, of which the file holds nothing" in inspect(folder).odd


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_unreadable_is_an_error(make_adapter, name):
    folder = make_adapter()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(LoraweaveError, match=name):
        inspect(folder)


def kohya(rank, *, conv=False):
    """The names that kohya's scripts give a U-Net attention LoRA."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    shape = (3, 3) if conv else ()
    return {
        f"{name}.lora_down.weight": torch.ones(rank, 8, *shape), f"{name}.lora_up.weight": torch.ones(8, rank, *shape),
        f"{name}.alpha": torch.tensor(2.0),
    }  # fmt: skip


SINGLE = {
    "kohya": kohya(4),
    "lycoris": {"lora_unet_a.hada_w1_a": torch.ones(2, 2)},
    "diffusers": {"unet.a.to_q.lora_A.weight": torch.ones(4, 8), "unet.a.to_q.lora_B.weight": torch.ones(8, 4)},
    "peft": {f"{KEY}.lora_A.weight": torch.ones(4, 8), f"{KEY}.lora_B.weight": torch.ones(8, 4)},
    "unknown": {"model.weight": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE)
def test_single_files(tmp_path, kind):
    path = tmp_path / "some.safetensors"
    save_file(SINGLE[kind], path, metadata={"ss_base_model_version": "sd_v1", "ss_tag_frequency": "x" * 5000})
    report = inspect(path)
    assert (report.format, report.mixable, report.base) == (kind, kind in ("kohya", "diffusers"), "sd_v1")
    assert report.mixable or report.reason.startswith(f"{path}: ")
    assert len(report.metadata["ss_tag_frequency"]) == 203
    if kind in ("kohya", "diffusers", "peft"):
        assert (report.modules, report.ranks, report.parameters) == (1, {4: 1}, 64)
        assert report.targets == {"q_proj" if kind == "peft" else "to_q": 1}
    assert report.scales == {"kohya": {0.5: 1}, "diffusers": {1.0: 1}}.get(kind, {})
    json.dumps(report.to_dict())


def test_old_diffusers_names(tmp_path):
    name = "unet.mid_block.attentions.0.processor.to_q_lora"
    path = tmp_path / "old.safetensors"
    save_file({f"{name}.down.weight": torch.ones(4, 8), f"{name}.up.weight": torch.ones(8, 4)}, path)
    report = inspect(path)
    assert (report.format, report.modules, report.ranks) == ("diffusers", 1, {4: 1})


def test_oddities_of_single_files(tmp_path):
    path = tmp_path / "odd.safetensors"
    tensors = kohya(4, conv=True) | {
        "lora_unet_x_fc1.lora_down.weight": torch.ones(2, 8),
        "lora_unet_x_fc1.dora_scale": torch.ones(1),
    }
    save_file(tensors, path)
    assert inspect(path).reason.startswith(f"{path}: DoRA is not additive")
    assert inspect(path).odd == [
        "has LoRAs on convolutions", "1 modules have only one of their two factors", "rank differs between modules",
    ]  # fmt: skip
    assert inspect(path).targets == {"to_q": 1, "fc1": 1}


def test_a_peft_file_without_its_configuration(make_adapter, tmp_path):
    save_file(load_file(make_adapter() / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    report = inspect(tmp_path / "adapter_model.safetensors")
    assert report.format == "peft"
    assert "has no adapter_config.json beside it, so its alpha is unknown" in report.reason


def test_a_damaged_single_file(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(SINGLE["kohya"], path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoraweaveError, match=r"cut\.safetensors: file is truncated"):
        inspect(path)


def test_reading_needs_torch_alone(make_adapter):
    """Neither peft nor transformers nor the hub's client is imported to read or report a local expert."""
    code = (
        "import sys; from loraweave.experts.inspection import inspect;"
        "from loraweave.experts.reader import read_expert;"
        "read_expert(sys.argv[1]); inspect(sys.argv[1]);"
        "print([name for name in ('peft', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(make_adapter())], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
