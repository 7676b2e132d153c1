"""LoHa and LoKr as LoRAs: against peft's own layers, and against the two formulas."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_adapters import edit_config, edit_tensors, tiny
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
from loraweave.experts import lycoris
from loraweave.experts.reader import fingerprint

CONFIGS = {
    "loha": peft.LoHaConfig(r=2, alpha=5, target_modules=["0"]),
    "loha, more than full": peft.LoHaConfig(r=4, alpha=5, target_modules=["0"]),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=["0"]),
    "lokr, both factored": peft.LoKrConfig(r=1, alpha=3, target_modules=["0"], decompose_both=True),
}


def update(tensors: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, int]:
    (found,) = lycoris.modules({key: tensor.shape for key, tensor in tensors.items()}).values()
    A, B = found.factors(tensors.__getitem__)
    assert A.shape == (found.rank, found.inputs)
    assert B.shape == (found.outputs, found.rank)
    return found.scale(alpha) * B @ A, found.rank


@pytest.mark.parametrize("features", [(12, 20), (20, 12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_makes_the_same_update(name: str, features: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(*features)), config)
    layer = model.base_model.model[0]
    tensors = {
        key.replace(".default", "").replace("base_model.model.0", "lora_unet_a"): torch.randn_like(value)
        for key, value in model.state_dict().items()
        if "hada" in key or "lokr" in key
    }
    model.load_state_dict(
        {key.replace("lora_unet_a", "base_model.model.0") + ".default": value for key, value in tensors.items()},
        strict=False,
    )
    made, rank = update(tensors, float(config.alpha))
    assert_close(made, layer.get_delta_weight("default").detach(), atol=1e-5, rtol=1e-5)
    assert rank <= 12


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_kronecker_products_of_whole_and_of_factored_matrices(kernel: tuple[int, ...]) -> None:
    """Of a convolution ``kron`` goes over channels; LyCORIS scales by nothing where both are whole."""
    torch.manual_seed(0)
    cells = 9 if kernel else 1
    w1, w2 = torch.randn(3, 2), torch.randn(4, 5, *kernel)
    by_hand = torch.zeros(12, 10, *kernel)
    for i in range(3):
        for j in range(2):
            by_hand[4 * i : 4 * i + 4, 5 * j : 5 * j + 5] = w1[i, j] * w2
    made, rank = update({"m.lokr_w1": w1, "m.lokr_w2": w2}, 7.0)
    assert_close(made, by_hand.flatten(1), atol=1e-5, rtol=1e-5)
    assert rank == 2 * 4
    up, down = torch.randn(4, 2), torch.randn(2, 5 * cells)
    made, rank = update({"m.lokr_w1": w1, "m.lokr_w2_a": up, "m.lokr_w2_b": down}, 7.0)
    assert_close(made, 3.5 * torch.kron(w1, up @ down), atol=1e-5, rtol=1e-5)
    assert rank == 4


BAD = {
    "expected hada_w1_a, hada_w1_b": {"m.hada_w1_a": (4, 2)},
    "its two products have shapes": {
        "m.hada_w1_a": (4, 2), "m.hada_w1_b": (2, 4), "m.hada_w2_a": (5, 2), "m.hada_w2_b": (2, 4),
    },
    "lokr_w2 is there neither whole nor as two factors": {"m.lokr_w1": (4, 4), "m.lokr_w2_a": (4, 2)},
    "has a third factor": {"m.lokr_w1": (4, 4), "m.lokr_w2": (4, 2), "m.lokr_t2": (2, 2, 3, 3)},
    "which no model has": {"m.lokr_w1": (1000, 1000), "m.lokr_w2": (1000, 1000)},
    "larger than 8 GB": {
        f"m{i}.lokr_{part}": (300, 300) for i in range(3) for part in ("w1", "w2")
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_none_is_one_line(message: str) -> None:
    with pytest.raises(lw.LoraweaveError, match=message) as caught:
        lycoris.modules(BAD[message])
    assert "\n" not in str(caught.value)


FOLDERS = {
    "loha": peft.LoHaConfig(
        r=2, alpha=5, rank_pattern={"o_proj": 3}, alpha_pattern={"down_proj": 7}, init_weights=False
    ),
    "lokr, stored whole": peft.LoKrConfig(r=4, alpha=6, init_weights=False),
    "lokr": peft.LoKrConfig(r=1, alpha=5, alpha_pattern={"layers.1.mlp.down_proj": 3}, init_weights=False),
    "lokr, both factored": peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, rank_dropout=0.1, init_weights=False
    ),
}  # fmt: skip


def saved(config: Any, folder: Path) -> Any:
    """The adapter in a tiny language model, and its folder."""
    torch.manual_seed(1)
    config = copy.deepcopy(config)
    config.target_modules = {"q_proj", "o_proj", "down_proj"}
    model: Any = peft.get_peft_model(tiny("llama"), config)
    for name, parameter in model.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data.normal_(std=0.7)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_peft_give_what_peft_computes(case: str, tmp_path: Path) -> None:
    reference = saved(FOLDERS[case], tmp_path / "one").eval()
    tokens = torch.arange(1, 9).view(2, 4)
    model: Any = tiny("llama")
    bare = model(tokens).logits
    expert, told = lw.read_expert(tmp_path / "one"), lw.inspect(tmp_path / "one")
    layers = {name: m for name, m in reference.named_modules() if hasattr(m, "get_delta_weight")}
    assert {f"base_model.model.{path}" for path in expert.factors} == layers.keys()
    for path, f in expert.factors.items():
        update = layers[f"base_model.model.{path}"].get_delta_weight("default")
        assert_close(f.scale * f.B @ f.A, update.detach(), atol=1e-5, rtol=1e-5)
    assert (told.mixable, told.reason, told.method) == (True, None, case[:4].upper())
    assert (told.modules, sum(told.ranks.values())) == (len(layers), len(layers))
    assert told.scales == Counter(f.scale for f in expert.factors.values())
    assert told.ranks == Counter(f.rank for f in expert.factors.values())
    assert told.sha256 == expert.sha256 == fingerprint(tmp_path / "one")
    mixture = lw.attach(model, {"one": tmp_path / "one"}, lw.Sum())
    assert_close(model(tokens).logits, reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (model(tokens).logits - bare).abs().max() > 0.1
    mixture.save_pretrained(tmp_path / "saved", copy_experts=True)
    mixed = model(tokens).logits
    mixture.detach()
    again = lw.load(tmp_path / "saved", model)
    assert_close(model(tokens).logits, mixed, atol=1e-5, rtol=1e-5)
    again.detach()


def change(folder: Path, **tensors: Any) -> None:
    edit_tensors(folder, lambda found: found.update({f"base_model.model.{name}": t for name, t in tensors.items()}))


Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    r"adapter_config\.json: field alpha is missing": lambda place: edit_config(place, alpha=None),
    r"field modules_to_save is set": lambda place: edit_config(place, modules_to_save=["lm_head"]),
    "NaN or infinite": lambda place: change(place, **{f"{Q}.hada_w1_a": torch.full((16, 2), torch.nan)}),
    "has dtype I64": lambda place: change(place, **{f"{Q}.hada_w1_a": torch.ones(16, 2).long()}),
    "has a third factor": lambda place: change(place, **{f"{Q}.hada_t1": torch.ones(2, 2, 3, 3)}),
    "its two products have shapes": lambda place: change(place, **{f"{Q}.hada_w1_a": torch.ones(15, 2)}),
    "has rank 2, but r and rank_pattern in adapter_config.json say 7": lambda place: edit_config(place, r=7),
    "whole weights of the base": lambda place: change(place, **{"lm_head.weight": torch.ones(40, 16)}),
    r"holds other tensors than hada_\.\.\.": lambda place: change(place, **{f"{Q}.lora_A.weight": torch.ones(2, 16),
                                                                            f"{Q}.lora_B.weight": torch.ones(16, 2)}),
    r"other tensors than lokr_\.\.\., but peft_type is 'LOKR'": lambda place: edit_config(place, peft_type="LOKR"),
    r"holds no LOHA \(no tensor is named like": lambda place: edit_tensors(
        place, lambda found: [found.pop(key) for key in list(found)]
    ),
    "not understood as part of a LoRA": lambda place: change(place, strange=torch.ones(2)),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_folders_that_cannot_be_mixed_are_one_line(message: str, tmp_path: Path) -> None:
    saved(peft.LoHaConfig(r=2, alpha=5), tmp_path)
    BROKEN[message](tmp_path)
    with pytest.raises(lw.LoraweaveError, match=message) as caught:
        lw.read_expert(tmp_path)
    assert "\n" not in str(caught.value)
    report = lw.inspect(tmp_path)
    assert (report.mixable, report.reason) == (False, str(caught.value))


def test_what_peft_cannot_convert_is_refused(tmp_path: Path) -> None:
    for config in (
        peft.LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=True),
        peft.LoKrConfig(r=1, target_modules=["0"], use_effective_conv2d=True),
    ):
        peft.get_peft_model(nn.Sequential(nn.Conv2d(16, 16, 3)), config).save_pretrained(tmp_path)
        with pytest.raises(lw.LoraweaveError, match=r"third factor \(Tucker\)"):
            lw.read_expert(tmp_path)
