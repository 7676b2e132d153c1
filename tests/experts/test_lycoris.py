"""LoHa and LoKr as LoRAs: against peft's own layers, and against the two formulas."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
from loraweave.experts import lycoris

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
