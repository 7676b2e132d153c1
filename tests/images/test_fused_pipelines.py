"""``lw.fuse`` over pipelines: the inputs are those of whole runs, and the file loads in plain diffusers."""

from __future__ import annotations

import copy
import pipes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw
from loraweave.experts.filewriter import write_lora_file

PROMPTS = {"hero": ["hero", "a hero on a hill"], "coat": ["coat"]}
CALL = {"height": pipes.SIZE, "width": pipes.SIZE, "num_inference_steps": 2}
RIDGE = 1e-6


def dense(f: lw.LoraFactors) -> Tensor:
    return f.scale * f.B.double() @ f.A.double().flatten(1)


def fuse(pipe: Any, files: Any, **options: Any) -> lw.Expert:
    return lw.fuse(pipe, files, PROMPTS, call=CALL, progress=False, **({"ridge": RIDGE} | options))


def module(pipe: Any, path: str) -> Any:
    part, _, inner = path.partition(".")
    return getattr(pipe, part).get_submodule(inner)


def inputs(pipe: Any, factors: Any, paths: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Every input of these modules while a copy of the pipeline with the LoRA in its weights paints the prompts."""
    own = copy.deepcopy(pipe)
    for path, f in factors.items():
        weight = module(own, path).weight
        weight.data += dense(f).view(weight.shape)
    seen: dict[str, list[Tensor]] = {}

    def see(path: str, x: Tensor) -> None:
        at = module(own, path)
        if x.ndim == 4:
            x = torch.nn.functional.unfold(x, at.kernel_size, at.dilation, at.padding, at.stride).mT
        seen.setdefault(path, []).append(x.flatten(0, -2))

    for path in paths:
        module(own, path).register_forward_pre_hook(lambda _, args, path=path: see(path, args[0]))
    for n, prompt in enumerate(prompts):
        own(prompt, generator=torch.Generator().manual_seed(5 + n), output_type="latent", **CALL)
    return {path: torch.cat(xs) for path, xs in seen.items()}


def test_least_squares_on_what_painting_shows(sets: Any) -> None:
    pipe, files, _ = sets("sd15")
    chosen = {name: files[name] for name in PROMPTS}
    fused = fuse(pipe, chosen, seed=5)
    mixture = lw.attach(pipe, chosen, lw.Sum())
    factors: dict[str, dict[str, Any]] = {name: {} for name in PROMPTS}
    for path, layer in mixture.layers.items():
        for n, name in enumerate(PROMPTS):
            if (f := layer.bank.factors(n)) is not None:
                factors[name][path] = f
    assert fused.factors.keys() == mixture.layers.keys()
    mixture.detach()
    X = {name: inputs(pipe, factors[name], fused.factors, PROMPTS[name]) for name in PROMPTS}
    kinds = set()
    for path, f in fused.factors.items():
        kinds.add((path.split(".")[0], f.A.ndim))
        x = torch.cat([X[name][path] for name in PROMPTS])
        zero = torch.zeros_like(dense(f))
        d = {n: dense(factors[n][path]) if path in factors[n] else zero for n in PROMPTS}
        y = torch.cat([X[name][path] @ d[name].T for name in PROMPTS])
        size = x.shape[1]
        root = (RIDGE * float((x**2).sum()) / size) ** 0.5
        wide, tall = torch.cat([x, root * torch.eye(size).to(x)]), torch.cat([y, torch.zeros(size, y.shape[1]).to(y)])
        assert_close(dense(f), torch.linalg.lstsq(wide, tall).solution.T, atol=1e-5, rtol=1e-4)
    assert kinds == {("unet", 2), ("unet", 4), ("text_encoder", 2)}


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_the_file_loads_in_plain_diffusers(kind: str, sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets(kind)
    fused = fuse(pipe, {name: files[name] for name in PROMPTS}, rank=3)
    assert {f.rank for f in fused.factors.values()} <= {1, 2, 3}
    file = write_lora_file(fused, tmp_path / "fused.safetensors")
    with pytest.raises(lw.LoraweaveError, match="exists"):
        write_lora_file(fused, file)

    def paint(pipe: Any) -> Tensor:
        made = pipe(pipes.PROMPT, generator=torch.Generator().manual_seed(0), **pipes.CALL).images
        return torch.as_tensor(made)

    bare, plain = paint(pipe), paint(pipes.loaded(pipe, {"fused": file}))
    attach(pipe, {"fused": file}, lw.Sum())
    assert_close(paint(pipe), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(bare, plain, atol=1e-2)


def test_refusals(sets: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets("sd15")
    with pytest.raises(lw.LoraweaveError, match="data of expert 'hero': expected prompts"):
        lw.fuse(pipe, {"hero": files["hero"]}, {"hero": [" "]}, progress=False)
    text = lw.Expert("text", {"model.q": lw.LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(lw.LoraweaveError, match=r"'model\.q': expected a pipeline's"):
        write_lora_file(text, tmp_path / "x.safetensors")
    with pytest.raises(lw.LoraweaveError, match=r"ends in \.safetensors"):
        write_lora_file(text, tmp_path / "x.bin")
