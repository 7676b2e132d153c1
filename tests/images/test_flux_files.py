"""Flux LoRAs in their four dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import same_picture
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

import loraweave as lw


def test_kohya_flux(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("flux")
    shapes = {
        "lora_unet_double_blocks_0_img_attn_proj": (16, 16), "lora_unet_double_blocks_0_img_attn_qkv": (16, 48),
        "lora_unet_double_blocks_0_txt_attn_qkv": (16, 48), "lora_unet_double_blocks_0_img_mlp_0": (16, 64),
        "lora_unet_single_blocks_0_linear2": (80, 16),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (16, 16),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (16, 16),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for stem, (into, out) in shapes.items():
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "flux.safetensors"
    save_file(tensors, path)
    report = same_picture(pipe, path, attach).sources[0].report
    assert (report.unmatched, report.modules, report.architecture) == ([], 11, "Flux")


def test_xlabs_flux(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("flux")
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    shapes = {"double_blocks.0.processor.qkv_lora": (16, 48), "double_blocks.0.processor.proj_lora": (16, 16)}
    stems = {f"{stem}{n}": shape for stem, shape in shapes.items() for n in (1, 2)}  # picture and text
    stems |= {"single_blocks.0.processor.qkv_lora": (16, 48), "single_blocks.0.processor.proj_lora": (80, 16)}
    for stem, (into, out) in stems.items():
        tensors[f"{stem}.down.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{stem}.up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
    save_file(tensors, tmp_path / "xlabs.safetensors")
    report = same_picture(pipe, tmp_path / "xlabs.safetensors", attach).sources[0].report
    assert (report.unmatched, report.modules, report.architecture) == ([], 12, "Flux")


@pytest.fixture(scope="module")
def whole() -> Any:
    """A full-sized pipeline, which takes no room on the meta device: two dialects are converted for no other."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)


D = 3072


def of_black_forest_labs() -> dict[str, tuple[int, int]]:
    """Layers by their authors' own names -> what goes in and comes out."""
    d, shapes = D, {"final_layer.linear": (D, 64)}
    for n in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{n}.{side}"
            shapes |= {f"{block}_attn.qkv": (d, 3 * d), f"{block}_attn.proj": (d, d), f"{block}_mod.lin": (d, 6 * d)}
            shapes |= {f"{block}_mlp.0": (d, 4 * d), f"{block}_mlp.2": (4 * d, d)}
    for n in range(38):
        block = f"single_blocks.{n}"
        shapes |= {
            f"{block}.linear1": (d, 7 * d),
            f"{block}.linear2": (5 * d, d),
            f"{block}.modulation.lin": (d, 3 * d),
        }
    return shapes


def test_kontext_flux(whole: Any, attach: Any, tmp_path: Path) -> None:
    shapes, tensors = of_black_forest_labs(), {}
    for name, (into, out) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(1, into, dtype=torch.float16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(out, 1, dtype=torch.float16)
    save_file(tensors, tmp_path / "kontext.safetensors")
    report = attach(whole, {"one": tmp_path / "kontext.safetensors"}, lw.Sum()).sources[0].report
    # each qkv is three modules, each linear1 three and the feed-forward's
    assert (report.unmatched, report.modules) == ([], 1 + 38 * (3 + 1 + 1 + 2) + 38 * (4 + 1 + 1))
    told = lw.inspect(tmp_path / "kontext.safetensors")
    assert (told.mixable, told.architecture, told.modules) == (True, "Flux", len(shapes))


def test_control_flux_is_no_expert(whole: Any, tmp_path: Path) -> None:
    """What diffusers does with it beside adding a LoRA: other norms, biases, and an input twice as wide."""
    shapes = of_black_forest_labs() | {"txt_in": (4096, D), "img_in": (128, D)}
    shapes |= {"final_layer.adaLN_modulation.1": (D, 2 * D)}
    for name, into in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= {f"{name}.in_layer": (into, D), f"{name}.out_layer": (D, D)}
    tensors = {}
    for name, (into, out) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.ones(2, into, dtype=torch.float16)
        tensors[f"{name}.lora_B.weight"] = torch.ones(out, 2, dtype=torch.float16)
        tensors[f"{name}.lora_B.bias"] = torch.ones(out, dtype=torch.float16)
    attentions = [f"double_blocks.{n}.{side}_attn.norm" for n in range(19) for side in ("img", "txt")]
    for name in [*attentions, *(f"single_blocks.{n}.norm" for n in range(38))]:
        for which in ("query", "key"):
            tensors[f"{name}.{which}_norm.scale"] = torch.ones(128, dtype=torch.float16)
    read = whole.lora_state_dict(dict(tensors))
    assert sum(".norm_" in key and "lora" not in key for key in read) == 2 * (2 * 19 + 38)
    assert sum(key.endswith(".lora_B.bias") for key in read) == sum(key.endswith(".lora_B.weight") for key in read)
    wide = read["transformer.x_embedder.lora_A.weight"].shape[1]
    assert (wide, whole.transformer.x_embedder.in_features) == (128, 64)
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(lw.LoraweaveError, match=r"is a control LoRA .*take the full control model") as caught:
        lw.attach(whole, {"one": tmp_path / "control.safetensors"}, lw.Sum())
    told = lw.inspect(tmp_path / "control.safetensors")
    assert "\n" not in str(caught.value)
    assert (told.mixable, told.reason, told.architecture) == (False, str(caught.value), "Flux")
