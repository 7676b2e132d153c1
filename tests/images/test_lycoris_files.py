"""LoHa, LoKr and files of denoisers that LyCORIS wrapped give the pictures of what they mean."""

from __future__ import annotations

import copy
import pipes
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dialects import CLOSE, kohya_sd15
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw


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
