"""Whatever is not ``scale * B A`` is refused by name, and a report says the same."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_adapters import edit_config, edit_tensors, tiny

from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.experts.inspection import inspect
from loraweave.experts.reader import read_expert

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(folder, match):
    """Reading raises one line; inspecting reports that line."""
    with pytest.raises(LoraweaveError, match=match) as caught:
        read_expert(folder)
    assert "\n" not in str(caught.value)
    report = inspect(folder)
    assert not report.mixable
    assert report.reason == str(caught.value)
    return report


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, r"adapter_config\.json: field use_dora is set: DoRA is not additive"),
        ({"modules_to_save": ["lm_head"]}, r"adapter_config\.json: field modules_to_save is set"),
        ({"lora_bias": True}, r"adapter_config\.json: field lora_bias is set"),
        ({"trainable_token_indices": [1, 2]}, r"adapter_config\.json: field trainable_token_indices is set"),
        ({"layer_replication": [(0, 2), (1, 2)]}, r"adapter_config\.json: field layer_replication is set"),
        ({"init_lora_weights": "olora"}, r"field init_lora_weights is 'olora': OLoRA changes the base"),
        ({"target_parameters": ["lm_head.weight"]}, r"adapter_config\.json: field target_parameters is set"),
    ],
)
def test_what_peft_saves_and_a_mixture_cannot_hold(make_adapter, options, match):
    refused(make_adapter(**options), match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, r"adapter_model\.safetensors: tensors .*lora_magnitude_vector.*: DoRA is not additive"),
        ({"modules_to_save": ["lm_head"]}, r"adapter_model\.safetensors: tensor '[^']*lm_head.weight': whole weights"),
        ({"lora_bias": True}, r"adapter_model\.safetensors: tensors .*lora_B.bias.* and 3 more: trained LoRA biases"),
        ({"trainable_token_indices": [1, 2]}, r"adapter_model\.safetensors: tensor .*: trained tokens"),
    ],
)
def test_tensors_tell_even_when_the_configuration_does_not(make_adapter, options, match):
    folder = make_adapter(**options)
    edit_config(folder, **dict.fromkeys(options))
    refused(folder, match)


def test_trained_biases(make_adapter):
    gpt2 = make_adapter("gpt2", "gpt2", bias="all")
    refused(gpt2, r"tensors '[^']*bias', .* more: trained biases \(bias='all'")
    llama = make_adapter("llama", "llama", bias="all")  # has no biases, so nothing was trained
    assert read_expert(llama).factors
    assert inspect(llama).odd[0] == "field bias is 'all', but the file holds no biases"


def test_resized_vocabulary(make_adapter):
    folder = make_adapter()
    edit_tensors(
        folder, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.ones(41, 16)})
    )
    refused(folder, r"embed_tokens\.weight': whole weights of the base \(modules_to_save, or a resized vocabulary\)")


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods(tmp_path, config):
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "other")
    kind = config.peft_type.value
    report = refused(
        tmp_path / "other", rf"field peft_type is '{kind}'; only LORA, LOHA and LOKR adapters can be mixed"
    )
    assert report.method == kind


@pytest.mark.parametrize(
    "field",
    ["use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"],
)
def test_variants_that_leave_no_trace_in_the_tensors(make_adapter, field):
    folder = make_adapter()
    edit_config(folder, **{field: {"a": 1}})
    refused(folder, rf"adapter_config\.json: field {field} is set: ")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_initialisations_that_change_the_base(make_adapter, init):
    folder = make_adapter()
    edit_config(folder, init_lora_weights=init)
    refused(folder, rf"field init_lora_weights is '{init}': .* changes the base weights")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_are_ordinary(make_adapter, init):
    folder = make_adapter()
    edit_config(folder, init_lora_weights=init)
    assert inspect(folder).mixable
    assert read_expert(folder).factors


def test_fields_of_a_newer_peft_are_mentioned(make_adapter):
    folder = make_adapter()
    edit_config(folder, use_time_travel=True, harmless=None, also_harmless=False)
    with pytest.warns(LoraweaveWarning, match="unknown fields use_time_travel are ignored"):
        read_expert(folder)
    assert any("use_time_travel" in sentence for sentence in inspect(folder).odd)


def set_to(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


def fill(key, value):
    return lambda tensors: tensors[key].view(-1).__setitem__(3, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(f"{KEY}.lora_A.weight"), r"tensor '.*q_proj.lora_B.weight' has no lora_A"),
        (lambda tensors: tensors.pop(f"{KEY}.lora_B.weight"), r"tensor '.*q_proj.lora_A.weight' has no lora_B"),
        (lambda tensors: tensors.clear(), "holds no LoRA"),
        (set_to(f"{KEY}.lora_B.weight", torch.ones(16, 3)), r"\[4, 16\] and '.*' \[16, 3\] do not fit; expected"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(4, 16, 3, 3)), r"3, 3\] and .* do not fit; expected \[rank, in, h"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(4, 16, 3)), r"shape \[4, 16, 3\], of a convolution"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(64)), r"shape \[64\]; expected two dimensions"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(0, 16)), r"shape \[0, 16\]; expected two dimensions, four of"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(4, 16).long()), r"dtype I64; expected one of F64, F32, F16, BF16"),
        (set_to(f"{KEY}.lora_A.weight", torch.ones(4, 16).to(torch.float8_e4m3fn)), "dtype F8_E4M3; expected one of"),
        (fill(f"{KEY}.lora_A.weight", float("nan")), r"tensor '.*layers\.0.*q_proj\.lora_A\.weight' has NaN or inf"),
        (fill(f"{KEY}.lora_B.weight", float("inf")), r"tensor '.*layers\.0.*q_proj\.lora_B\.weight' has NaN or inf"),
        (set_to("base_model.model.mystery", torch.ones(1)), "tensor 'base_model.model.mystery': not understood"),
        (set_to("lora_unet_mid.lora_down.weight", torch.ones(1)), r"names of image LoRAs \(kohya, diffusers\)"),
        (set_to(f"{KEY}.lora_A.default.weight", torch.ones(4, 16)), "are both lora_A of one module"),
        (set_to("base_model.model.x.lora_A.other.weight", torch.ones(4, 16)), r"holds several adapters \(, other\)"),
    ],
)  # fmt: skip
def test_damaged_or_foreign_tensors(make_adapter, change, match):
    folder = make_adapter()
    edit_tensors(folder, change)
    refused(folder, r"adapter_model\.safetensors: .*" + match)


def test_both_factors_of_the_wrong_rank(make_adapter):
    folder = make_adapter()
    edit_config(folder, r=8)
    refused(folder, r"has rank 4, but r and rank_pattern in adapter_config\.json say 8; the two files do not belong")


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_missing_number(make_adapter, field):
    folder = make_adapter()
    edit_config(folder, **{field: None})
    refused(folder, rf"adapter_config\.json: field {field} is missing; expected a number")


def test_every_reason_is_reported(make_adapter):
    folder = make_adapter(use_dora=True, modules_to_save=["lm_head"])
    report = inspect(folder)
    assert [sentence.partition(": ")[2][:22] for sentence in [report.reason, *report.odd[:3]]] == [
        "field use_dora is set:", "field modules_to_save ", "tensor 'base_model.mod", "tensors 'base_model.mo",
    ]  # fmt: skip
