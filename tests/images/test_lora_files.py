"""LoRA files as they circulate give the pictures that diffusers makes of them, and nothing is dropped in silence."""

from __future__ import annotations

import copy
import json
import pipes
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dialects import CLOSE, kohya, kohya_sd15, kohya_sdxl, named, same_picture
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw


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


def test_kohya_sdxl_with_both_text_encoders(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, _, _ = sets("sdxl")
    modules = pipes.targets(pipe, pipes.ATTENTION)
    path = tmp_path / "xl.safetensors"
    save_file(kohya(pipes.factors(modules, 5, 2), kohya_sdxl, 1.0), path)
    report = same_picture(pipe, path, attach).sources[0].report
    assert (report.unmatched, report.modules, report.architecture) == ([], len(modules), "SDXL")
    assert lw.inspect(path).architecture == "SDXL"


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
