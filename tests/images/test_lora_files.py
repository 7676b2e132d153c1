"""LoRA files as they circulate give the pictures that diffusers makes of them, and nothing is dropped in silence."""

from __future__ import annotations

import copy
import json
import pipes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def kohya_sd15(path: str) -> str:
    part, _, inner = path.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
    return prefix + inner.replace(".", "_")


def kohya_sdxl(path: str) -> str:
    part, _, inner = path.partition(".")
    if part != "unet":
        nested = "" if inner.startswith("text_model.") else "text_model_"
        return {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part] + nested + inner.replace(".", "_")
    for name, sgm in {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }.items():
        inner = inner.replace(name, sgm)
    return "lora_unet_" + inner.replace(".", "_")


def kohya(pairs: Mapping[str, tuple[Tensor, Tensor]], name: Callable[[str], str], alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for path, (a, b) in pairs.items():
        stem = name(path)
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(alpha)}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def same_picture(pipe: Any, path: Path, attach: Any) -> Any:
    """The mixture of this one file, after its picture equalled the one by way of diffusers."""
    mixture = attach(pipe, {"one": path}, lw.Sum())
    mixed = pipes.latents(pipe)
    mixture.detach()
    bare = pipes.latents(pipe)
    assert (mixed - bare).abs().max() > 0.01
    assert_close(mixed, pipes.latents(pipes.loaded(pipe, {"one": path})), **CLOSE)
    return mixture


def test_kohya_sd15_with_convolutions(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    modules = pipes.targets(pipe, pipes.ATTENTION + pipes.OTHERS + pipes.CONVS)
    path = tmp_path / "civitai.safetensors"
    meta = {
        "ss_tag_frequency": json.dumps({"10_x": {"hero": 9, "coat": 3, "sky": 5}}),
        "ss_base_model_version": "sd_v1",
    }
    save_file(kohya(pipes.factors(modules, 5, 4), kohya_sd15, 2.0), path, metadata=meta)
    report = same_picture(pipe, path, attach).sources[0].report
    assert (report.unmatched, report.scales, report.ranks) == ([], {0.5: len(modules)}, {4: len(modules)})
    assert (report.matched, report.triggers) == (3 * len(modules), ["hero", "sky", "coat"])
    assert 0.05 < report.text_encoder_share < 0.5


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_lycoris_sd15_with_convolutions(kind: str, sets: Any, attach: Any, tmp_path: Path) -> None:
    """The picture is that of weights changed by the formula itself."""
    pipe, _, _ = sets("sd15")
    modules = pipes.targets(pipe, pipes.ATTENTION + pipes.CONVS)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    changed, tensors = copy.deepcopy(pipe), {}
    for path in modules:
        part, _, inner = path.partition(".")
        weight = changed.components[part].get_submodule(inner).weight
        out, into = weight.flatten(1).shape
        stem = kohya_sd15(path)
        if kind == "LoHa":
            parts = {"hada_w1_a": random(out, 2), "hada_w1_b": random(2, into)}
            parts |= {"hada_w2_a": random(out, 2), "hada_w2_b": random(2, into)}
            update = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        else:
            parts = {"lokr_w1": random(2, 2), "lokr_w2_a": random(out // 2, 2), "lokr_w2_b": random(2, into // 2)}
            update = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()} | {f"{stem}.alpha": torch.tensor(6.0)}
        with torch.no_grad():
            weight += 3.0 * update.view_as(weight)
    file = tmp_path / "lycoris.safetensors"
    save_file(tensors, file)
    told = lw.inspect(file)
    assert (told.mixable, told.modules, told.scales) == (True, len(modules), {3.0: len(modules)})
    bare = pipes.latents(pipe)
    mixture = attach(pipe, {"one": file}, lw.Sum())
    report = mixture.sources[0].report
    assert (report.unmatched, report.matched, report.ranks) == ([], len(tensors), told.ranks)
    mixed = pipes.latents(pipe)
    assert (mixed - bare).abs().max() > 0.01
    assert_close(mixed, pipes.latents(changed), **CLOSE)


@pytest.mark.parametrize("flat", [True, False])
def test_kohya_sd2(flat: bool, sets: Any, attach: Any, tmp_path: Path) -> None:
    """Older trainers keep the linear projections in and out as 1 x 1 convolutions."""
    pipe, _, _ = sets("sd2")
    modules = pipes.targets(pipe, (*pipes.ATTENTION, *pipes.OTHERS, "proj_out", "fc2"))
    pairs = pipes.factors(modules, 5, 4)
    save_file(kohya(pairs, kohya_sd15, 2.0), tmp_path / "sd2.safetensors")
    if flat:
        report = same_picture(pipe, tmp_path / "sd2.safetensors", attach).sources[0].report
        assert (report.unmatched, report.modules, report.scales) == ([], len(modules), {0.5: len(modules)})
        assert 0.05 < report.text_encoder_share < 0.5
        return
    squares = {
        path: (a[:, :, None, None], b[:, :, None, None]) if path.endswith(("proj_in", "proj_out")) else (a, b)
        for path, (a, b) in pairs.items()
    }
    assert any(a.ndim == 4 for a, _ in squares.values())
    save_file(kohya(squares, kohya_sd15, 2.0), tmp_path / "squares.safetensors")
    found = []
    for name in ("sd2", "squares"):
        mixture = attach(pipe, {"one": tmp_path / f"{name}.safetensors"}, lw.Sum())
        assert mixture.sources[0].report.unmatched == []
        found.append(pipes.latents(pipe))
        mixture.detach()
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
@pytest.mark.parametrize("form", ["LoCon", "LoHa", "LoKr"])
def test_names_of_denoisers_that_lycoris_wrapped(form: str, kind: str, sets: Any, attach: Any, tmp_path: Path) -> None:
    """The picture is that of peft's layers; the alphas in the file count."""
    pipe, _, _ = sets(kind)
    part = pipes.denoiser(pipe)
    modules = {p: m for p, m in pipes.targets(pipe, pipes.ATTENTION + pipes.CONVS).items() if p.startswith(part)}
    common = {"r": 2, "target_modules": [path.partition(".")[2] for path in modules]}
    config = {
        "LoCon": lambda: peft.LoraConfig(lora_alpha=6, init_lora_weights=False, **common),
        "LoHa": lambda: peft.LoHaConfig(alpha=6, init_weights=False, **common),
        "LoKr": lambda: peft.LoKrConfig(alpha=6, init_weights=False, **common),
    }[form]()
    torch.manual_seed(4)
    other = copy.deepcopy(pipe)
    wrapped = peft.get_peft_model(other.components[part].float(), config)
    tensors: dict[str, Tensor] = {}
    for name, parameter in wrapped.named_parameters():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.(hada_\w+|lokr_\w+|lora_[AB])\.default(\.weight)?", name):
            own = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(match[2], match[2])
            stem = "lycoris_" + match[1].replace(".", "_")
            tensors |= {f"{stem}.{own}": parameter.detach(), f"{stem}.alpha": torch.tensor(6.0)}
    if form == "LoKr":  # as LyCORIS has it: where both matrices are whole nothing is divided by the rank
        for module in wrapped.modules():
            if getattr(module, "lokr_w2", None):
                module.scaling["default"] = 1.0
    file = tmp_path / "lycoris.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    setattr(other, part, wrapped.merge_and_unload().double())
    bare = pipes.latents(pipe)
    mixture = attach(pipe, {"one": file}, lw.Sum())
    report = mixture.sources[0].report
    assert (report.unmatched, report.modules, report.matched) == ([], len(modules), len(tensors))
    assert (report.scales, report.ranks) == (lw.inspect(file).scales, lw.inspect(file).ranks)
    mixed = pipes.latents(pipe)
    assert (mixed - bare).abs().max() > 0.01
    assert_close(mixed, pipes.latents(other), **CLOSE)
    mixture.detach()
    tensors |= {
        "lycoris_no_such.lora_down.weight": torch.ones(2, 4),
        "lycoris_no_such.lora_up.weight": torch.ones(4, 2),
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    with pytest.warns(lw.LoraweaveWarning, match=r": 2 of \d+ tensors .*: lycoris_no_such\.lora_down\.weight, lycoris"):
        attach(pipe, {"one": file}, lw.Sum())


def test_kohya_sdxl_with_both_text_encoders(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sdxl")
    modules = pipes.targets(pipe, pipes.ATTENTION)
    path = tmp_path / "xl.safetensors"
    save_file(kohya(pipes.factors(modules, 5, 2), kohya_sdxl, 1.0), path)
    report = same_picture(pipe, path, attach).sources[0].report
    assert (report.unmatched, report.modules, report.architecture) == ([], len(modules), "SDXL")
    assert lw.inspect(path).architecture == "SDXL"


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


def test_kontext_flux(attach: Any, tmp_path: Path) -> None:
    """diffusers converts this dialect for the full-sized model alone, which takes no room on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)
    d, shapes = 3072, {"final_layer.linear": (3072, 64)}
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
    tensors = {}
    for name, (into, out) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(1, into, dtype=torch.float16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(out, 1, dtype=torch.float16)
    save_file(tensors, tmp_path / "kontext.safetensors")
    report = attach(pipe, {"one": tmp_path / "kontext.safetensors"}, lw.Sum()).sources[0].report
    # each qkv is three modules, each linear1 three and the feed-forward's
    assert (report.unmatched, report.modules) == ([], 1 + 38 * (3 + 1 + 1 + 2) + 38 * (4 + 1 + 1))
    told = lw.inspect(tmp_path / "kontext.safetensors")
    assert (told.mixable, told.architecture, told.modules) == (True, "Flux", len(shapes))


def test_old_names_of_diffusers(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    tensors = {}
    for path, (a, b) in pipes.factors(pipes.targets(pipe, ("to_q", "to_v")), 1, 3).items():
        block, _, leaf = path.rpartition(".")
        tensors |= {f"{block}.processor.{leaf}_lora.down.weight": a, f"{block}.processor.{leaf}_lora.up.weight": b}
    save_file(tensors, tmp_path / "old.safetensors")
    assert same_picture(pipe, tmp_path / "old.safetensors", attach).sources[0].report.unmatched == []


def test_alpha_in_the_header_of_diffusers(sets: Any, attach: Any, tmp_path: Path) -> None:
    """Written by diffusers' own save_lora_weights with the configuration of peft."""
    pipe, _, _ = sets("sd15")
    trained = copy.deepcopy(pipe)
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_v"], use_rslora=True, init_lora_weights=False,
        rank_pattern={"attn2.to_v": 2},
    )  # fmt: skip
    torch.manual_seed(3)
    trained.unet.float().add_adapter(config)
    layers = peft.get_peft_model_state_dict(trained.unet)
    trained.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict())
    mixture = same_picture(pipe, tmp_path, attach)
    assert set(mixture.sources[0].report.scales) == {1.0, 2 / 2**0.5}


@pytest.mark.parametrize("form", ["LoRA", "LoHa", "LoKr"])
def test_peft_folder_of_one_model(form: str, sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    unet = copy.deepcopy(pipe.unet).float()
    torch.manual_seed(3)
    common = {"r": 1 if form == "LoKr" else 3, "target_modules": ["to_q", "conv1", "proj_in"]}
    config = {
        "LoRA": lambda: peft.LoraConfig(lora_alpha=6, init_lora_weights=False, **common),
        "LoHa": lambda: peft.LoHaConfig(alpha=6, init_weights=False, **common),
        "LoKr": lambda: peft.LoKrConfig(alpha=6, init_weights=False, **common),
    }[form]()
    wrapped = peft.get_peft_model(unet, config)
    wrapped.save_pretrained(tmp_path)
    mixture = attach(pipe, {"one": tmp_path}, lw.Sum())
    mixed = pipes.latents(pipe)
    mixture.detach()
    other = copy.deepcopy(pipe)
    other.unet = wrapped.merge_and_unload().double()
    assert_close(mixed, pipes.latents(other), **CLOSE)
    assert (mixed - pipes.latents(pipe)).abs().max() > 0.01


def test_a_half_matching_file_warns_with_the_list(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets("sd15")
    tensors = load_file(files["hero"])
    tensors |= named("unet.no.such.to_q", torch.ones(2, 4), torch.ones(4, 2))
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.warns(
        lw.LoraweaveWarning, match=r"half\.safetensors: 2 of \d+ tensors fit nothing in .*no\.such\.to_q\.lora_A"
    ):
        mixture = attach(pipe, {"one": tmp_path / "half.safetensors"}, lw.Sum())
    assert mixture.sources[0].report.unmatched == [
        "unet.no.such.to_q.lora_A.weight", "unet.no.such.to_q.lora_B.weight",
    ]  # fmt: skip


def test_kohya_keys_that_diffusers_stumbles_over_are_reported(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    tensors = kohya(pipes.factors(pipes.targets(pipe, ("to_q",)), 5, 4), kohya_sd15, 2.0)
    tensors |= {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "position_ids.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.warns(
        lw.LoraweaveWarning, match=r"2 of \d+ tensors fit nothing.*: lora_unet_x\.lora_down\.weight, position_ids"
    ):
        attach(pipe, {"one": tmp_path / "odd.safetensors"}, lw.Sum())


def test_alphas_may_be_whole_numbers(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    tensors = kohya(pipes.factors(pipes.targets(pipe, ("to_q",)), 5, 4), kohya_sd15, 2.0)
    for name, dtype in (("whole", torch.int64), ("half", torch.bfloat16)):
        kept = {key: t.to(dtype) if key.endswith(".alpha") else t for key, t in tensors.items()}
        path = tmp_path / f"{name}.safetensors"
        save_file(kept, path)
        mixture = attach(pipe, {"one": path}, lw.Sum())
        assert set(mixture.sources[0].report.scales) == set(lw.inspect(path).scales) == {0.5}
        mixture.detach()


def test_text_encoders_alone_do_not_make_a_file_fit(sets: Any, attach: Any, tmp_path: Path) -> None:
    """A file for SDXL finds SD 1.5's text encoder in an SD 1.5 pipeline; one for text encoders alone is in order."""
    pipe, files, _ = sets("sd15")
    larger, _, _ = sets("sdxl")
    path = tmp_path / "xl.safetensors"
    save_file(kohya(pipes.factors(pipes.targets(larger, pipes.ATTENTION), 5, 2), kohya_sdxl, 1.0), path)
    with pytest.raises(lw.LoraweaveError, match=r"of its denoiser nothing fits StableDiffusionPipeline; .* for SDXL"):
        lw.attach(pipe, {"xl": path}, lw.Sum())
    mixture = attach(pipe, files, lw.Sum())
    mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    mixture.detach()
    other, _, _ = sets("flux")
    with pytest.raises(lw.LoraweaveError, match=r"hero: of its denoiser nothing fits FluxPipeline; missing .* unet\."):
        lw.load(tmp_path / "saved", other)
    text = pipes.factors({p: m for p, m in pipes.targets(pipe, pipes.ATTENTION).items() if p.startswith("text")}, 1, 2)
    save_file(kohya(text, kohya_sd15, 1.0), tmp_path / "text.safetensors")
    same_picture(pipe, tmp_path / "text.safetensors", attach)


def test_kohya_for_sd3_says_what_to_do(sets: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd3")
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(48, 2)},
              tmp_path / "k.safetensors")  # fmt: skip
    with pytest.raises(lw.LoraweaveError, match="kohya's for SD3, which diffusers cannot convert: have it in"):
        lw.attach(pipe, {"k": tmp_path / "k.safetensors"}, lw.Sum())


def named(stem: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


MID = "unet.mid_block.attentions.0."
REFUSED = {
    "DoRA is not additive": {
        "lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2),
        "lora_unet_a.dora_scale": torch.ones(4),
    },
    "'lora_unet_a' has hada_w1_a; expected hada_w1_a, hada_w1_b": {"lora_unet_a.hada_w1_a": torch.ones(2, 2)},
    "lokr_w2 is there neither whole nor as two factors": {"lora_unet_a.lokr_w1": torch.ones(2, 2)},
    "is a control LoRA": named("double_blocks.0.img_attn.qkv", torch.ones(2, 16), torch.ones(48, 2))
        | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8)},
    "trained biases beside the LoRA": named(MID + "proj_in", torch.ones(2, 16), torch.ones(16, 2))
        | {MID + "proj_in.lora_B.bias": torch.ones(16)},
    "is a OFT, not a plain LoRA": {"lora_unet_a.oft_blocks": torch.ones(2, 2)},
    "nothing in it fits StableDiffusionPipeline; it looks made for Flux":
        named("transformer.single_transformer_blocks.0.attn.to_q", torch.ones(2, 4), torch.ones(4, 2)),
    "NaN or infinite": named(MID + "proj_in", torch.full((2, 16), torch.nan), torch.ones(16, 2)),
    "maps 16 to 16 features in this model, the expert expects 24 to 16":
        named(MID + "transformer_blocks.0.attn1.to_q", torch.ones(2, 24), torch.ones(16, 2)),
    "a kernel of": named("unet.conv_in", torch.ones(2, 4, 5, 5), torch.ones(8, 2, 1, 1)),
    "do not fit": named("unet.conv_in", torch.ones(2, 4, 3, 3), torch.ones(8, 3, 1, 1)),
    "has dtype I64": named("unet.conv_in", torch.ones(2, 4, 3, 3).long(), torch.ones(8, 2, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_files_leave_the_pipeline_alone(message: str, sets: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    save_file(REFUSED[message], tmp_path / "bad.safetensors")
    before = {id(module) for module in pipe.unet.modules()}
    with pytest.raises(lw.LoraweaveError, match=message):
        lw.attach(pipe, {"bad": tmp_path / "bad.safetensors"}, lw.Sum())
    assert {id(module) for module in pipe.unet.modules()} == before


def test_pickles_are_refused(sets: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sd15")
    for place in (tmp_path / "x.bin", tmp_path):
        torch.save({}, tmp_path / "x.bin")
        with pytest.raises(lw.LoraweaveError, match="pickled weights are refused"):
            lw.attach(pipe, {"bad": place}, lw.Sum())


@pytest.mark.parametrize(
    ("name", "width", "guess"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, "SD 1.x"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "SD 2.x"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, "SD3"),
        ("lora_unet_something_else", 8, None),
    ],
)
def test_inspect_guesses_the_architecture(name: str, width: int, guess: str | None, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(4, 2)}, path)
    report = lw.inspect(path)
    assert (report.architecture, report.mixable, report.reason) == (guess, True, None)


def test_inspect_tells_the_scale_that_attaching_finds(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets("sd15")
    layers = peft.get_peft_model_state_dict
    trained = copy.deepcopy(pipe)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], rank_pattern={"attn2.to_v": 2})
    trained.unet.float().add_adapter(config)
    trained.save_lora_weights(
        tmp_path, unet_lora_layers=layers(trained.unet), unet_lora_adapter_metadata=config.to_dict()
    )
    for path in (tmp_path / "pytorch_lora_weights.safetensors", files["hero"]):
        told = attach(pipe, {"one": path}, lw.Sum())
        report = lw.inspect(path)
        assert (report.scales, report.ranks) == (told.sources[0].report.scales, told.sources[0].report.ranks)
        told.detach()
    assert "to_out.0" in lw.inspect(files["hero"]).targets


STEM = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("changed", "reason", "odd"),
    [
        ({"lora_up.weight": torch.full((16, 2), torch.nan)}, "NaN or infinite", None),
        ({"lora_up.weight": torch.ones(16, 3)}, "which do not fit", None),
        ({"lora_up.weight": torch.ones(16, 2).long()}, "has dtype I64", None),
        ({"alpha": torch.tensor(torch.inf)}, "is not finite", None),
        ({"alpha": torch.tensor(0.0)}, None, "alpha is 0 in some modules: they do nothing"),
        ({"lora_down.weight": torch.ones(40, 16), "lora_up.weight": torch.ones(16, 40)}, None, "more than a full"),
    ],
)
def test_inspect_finds_what_attaching_would_refuse(
    changed: dict[str, Tensor], reason: str | None, odd: str | None, tmp_path: Path
) -> None:
    tensors = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(1.0)}
    save_file({f"{STEM}.{key}": t for key, t in (tensors | changed).items()}, tmp_path / "one.safetensors")
    report = lw.inspect(tmp_path / "one.safetensors")
    assert report.mixable is (reason is None)
    assert reason is None or reason in (report.reason or "")
    assert odd is None or any(odd in line for line in report.odd)
    with pytest.raises(lw.LoraweaveError, match=r"nowhere\.safetensors: no such file"):
        lw.inspect(tmp_path / "nowhere.safetensors")
