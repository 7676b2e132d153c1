"""SVDiff: shifts of singular values, against a decomposition by hand."""

from __future__ import annotations

import pipes
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.integrations.svdiff import apply_shifts, compose_shifts, read_shifts

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NAMES = (LINEAR, "conv_in", "conv_norm_out")


def expert(unet: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {n: m.weight.flatten(1).shape if m.weight.ndim > 1 else (1,) for n, m in unet.named_modules() if n in NAMES}
    return {n: torch.randn(min(size), generator=generator) for n, size in sizes.items()}


def by_hand(weight: Tensor, delta: Tensor) -> Tensor:
    matrix = weight.reshape(1, -1) if weight.ndim == 1 else weight.reshape(weight.shape[0], -1)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    total = torch.zeros_like(matrix)
    for k in range(len(S)):
        total += max(float(S[k] + delta[k]), 0.0) * torch.outer(U[:, k], Vh[k])
    return total.reshape(weight.shape)


def test_composed_shifts_equal_the_equation_and_leave_no_trace(tmp_path: Path) -> None:
    unet = pipes.make("sd15").unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    experts = []
    for seed in (0, 1):
        save_file({f"{n}.delta": d for n, d in expert(unet, seed).items()}, tmp_path / f"{seed}.safetensors")
        experts.append(read_shifts(tmp_path / f"{seed}.safetensors"))
    assert set(experts[0]) == set(NAMES)
    with apply_shifts(unet, compose_shifts(experts, [2.0, -0.5])):
        for name, value in unet.state_dict().items():
            module = name.removesuffix(".weight")
            if module in NAMES:
                delta = 2.0 * experts[0][module].double() - 0.5 * experts[1][module].double()
                torch.testing.assert_close(value, by_hand(before[name], delta))
                assert not torch.equal(value, before[name])
            else:
                assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_weights_come_back_after_an_error() -> None:
    unet = pipes.make("sd15").unet
    before = unet.conv_in.weight.clone()
    with pytest.raises(KeyError), apply_shifts(unet, expert(unet, 0)):
        raise KeyError
    assert torch.equal(unet.conv_in.weight, before)


def test_what_is_refused(tmp_path: Path) -> None:
    unet = pipes.make("sd15").unet
    with (
        pytest.raises(LoraweaveError, match="conv_in: expected 8 shifts"),
        apply_shifts(unet, {"conv_in": torch.ones(7)}),
    ):
        pass
    with pytest.raises(LoraweaveError, match="did you mean 'conv_in'"), apply_shifts(unet, {"conv_inn": torch.ones(8)}):
        pass
    with pytest.raises(LoraweaveError, match="pickled"):
        read_shifts(tmp_path / "shifts.bin")
    save_file({"conv_in.delta": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraweaveError, match=r"expected .<module>\.delta"):
        read_shifts(tmp_path / "x.safetensors")
    with pytest.raises(LoraweaveError, match="conv_in: expected 8 shifts as in"):
        compose_shifts([{"conv_in": torch.ones(8)}, {"conv_in": torch.ones(7)}])
