"""Switch, Composite and Regional equal the slow ways of doing the same."""

from __future__ import annotations

import pipes
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EVERYONE = dict.fromkeys(pipes.NAMES, 1 / 3)
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++2m": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
}


def run(pipe: Any, steps: int, guidance: float, **options: Any) -> Tensor:
    return pipes.latents(pipe, num_inference_steps=steps, guidance_scale=guidance, latents=pipes.start(), **options)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_composite_equals_an_average_by_hand(kind: str, guidance: float, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    expected = pipes.by_hand(reference, pipes.NAMES, lambda _: EVERYONE, 2, guidance)
    mixture = attach(pipe, files, lw.Composite())
    assert_close(run(pipe, 2, guidance), expected, **CLOSE)
    mixture.policy = lw.Composite(chunk=2)
    assert_close(run(pipe, 2, guidance), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_composite_of_transformers(kind: str, chunk: int | None, textless: Any, attach: Any) -> None:
    pipe, files, reference = textless(kind)
    weights = {"hero": 3.0, "ink": 1.0}
    attach(pipe, files, lw.Composite(weights, chunk=chunk))
    mixed = pipes.latents(pipe)
    inner = reference.transformer
    reference.transformer = pipes.Averaged(inner, ["hero", "ink"], [0.75, 0.25])
    try:
        assert_close(mixed, pipes.latents(reference), **CLOSE)
    finally:
        reference.transformer = inner


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_composite_of_one_expert_alone_is_that_expert(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    mixture = attach(pipe, files, lw.Composite())
    reference.set_adapters(["coat"])
    expected = pipes.latents(reference)
    with mixture.only("coat"):
        assert_close(pipes.latents(pipe), expected, **CLOSE)
    mixture.policy = lw.Composite({"coat": 2.0})
    assert_close(pipes.latents(pipe), expected, **CLOSE)
    mixture.policy = lw.Switch(every=1, order=["coat"])
    assert_close(pipes.latents(pipe), expected, **CLOSE)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_switch_equals_swapping_by_hand(name: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets("sd15")
    before = pipe.scheduler
    pipe.scheduler, reference.scheduler = SCHEDULERS[name](), SCHEDULERS[name]()
    order = ["ink", "hero", "coat"]

    def turn(evaluation: int) -> Mapping[str, float]:
        step = {"heun": evaluation // 2, "kdpm2": evaluation // 2, "pndm": max(evaluation - 1, 0)}.get(name, evaluation)
        if name == "pndm" and evaluation == 1:
            step = 1
        return {order[step % 6 // 2]: 1.0}

    try:
        attach(pipe, files, lw.Switch(every=2, order=order))
        expected = pipes.by_hand(reference, pipes.NAMES, turn, 7, 3.0)
        for _ in range(2):  # a second call begins with the first turn again
            assert_close(run(pipe, 7, 3.0), expected, **CLOSE)
    finally:
        pipe.scheduler = reference.scheduler = before


def test_switch_within_a_part_of_the_run_and_with_masked_experts(sets: Any, attach: Any) -> None:
    pipe, files, reference = sets("sdxl")
    mixture = attach(pipe, files, lw.Switch(every=1, start=0.25, stop=0.8))
    # 0.25 of 5 steps are 1.25: the second step is the last that begins before.
    turns: list[dict[str, float]] = [{}, {}, {"hero": 1.0}, {"coat": 1.0}, {}]
    expected = pipes.by_hand(reference, pipes.NAMES, lambda n: turns[n], 5, 3.0)
    assert_close(run(pipe, 5, 3.0), expected, **CLOSE)
    mixture.policy = lw.Switch(every=2)
    with mixture.without("coat"):
        order = ["hero", "hero", "ink", "ink", "hero"]
        expected = pipes.by_hand(reference, pipes.NAMES, lambda n: {order[n]: 1.0}, 5, 3.0)
        assert_close(run(pipe, 5, 3.0), expected, **CLOSE)


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_regional_with_full_masks_equals_merge(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, _ = sets(kind)
    mixture = attach(pipe, files, lw.Sum())
    merged = pipes.latents(pipe)
    mixture.policy = lw.Regional({"hero": None, "coat": torch.ones(5, 7), "ink": (0, 0, 1, 1)})
    assert_close(pipes.latents(pipe), merged, **CLOSE)
    mixture.policy = lw.Regional({"hero": None, "ink": None})
    with_two = pipes.latents(pipe)
    mixture.policy = lw.Sum(weights={"coat": 0.0})
    assert_close(with_two, pipes.latents(pipe), **CLOSE)


MASKS = {"hero": (0.0, 0.0, 0.5, 1.0), "coat": torch.eye(4), "ink": (0.25, 0.5, 1.0, 1.0)}


def cells(name: str, height: int, width: int) -> Tensor:
    """The mask on a grid, cell by cell; of boxes whose edges lie on cells or half-way through them."""
    fine = torch.zeros(16, 16)
    if name == "coat":
        for n in range(4):
            fine[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = 1.0
    else:
        x0, y0, x1, y1 = (int(16 * edge) for edge in MASKS[name])
        fine[y0:y1, x0:x1] = 1.0
    return fine.view(height, 16 // height, width, 16 // width).mean((1, 3)).double()


def masked_by_hand(pipe: Any, experts: Mapping[str, lw.Expert], grid: int, text_tokens: int) -> list[Any]:
    """Hooks that add every expert's term under its mask, module by module."""
    modules = {f"{n}.{p}": m for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)
               for p, m in part.named_modules()}  # fmt: skip

    def hook(path: str) -> Any:
        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            for name, expert in experts.items():
                if path not in expert.factors:
                    continue
                f = expert.factors[path]
                a, b = f.A.double(), f.B.double() * f.scale
                if output.ndim == 4:
                    stride, padding = module.stride, module.padding
                    term = torch.einsum(
                        "brhw,or->bohw", torch.nn.functional.conv2d(args[0], a, None, stride, padding), b
                    )
                    term = term * cells(name, *output.shape[2:])
                else:
                    term = args[0] @ a.T @ b.T
                    side = {grid**2: grid, (grid // 2) ** 2: grid // 2, text_tokens + grid**2: grid}
                    told = "attn2.to_k" in path or "attn2.to_v" in path or "add_k" in path
                    if output.ndim == 3 and path.startswith(("unet", "transformer.")) and not told:
                        at = cells(name, *[side[output.shape[1]]] * 2).flatten()
                        if output.shape[1] == text_tokens + grid**2:
                            at = torch.cat([torch.ones(text_tokens).double(), at])
                        term = term * at[:, None]
                output = output + term
            return output

        return add

    paths = sorted({path for expert in experts.values() for path in expert.factors})
    return [modules[path].register_forward_hook(hook(path)) for path in paths]


@pytest.mark.parametrize(("kind", "grid", "text"), [("sd15", 8, 99), ("sdxl", 8, 99), ("sd3", 4, 12), ("flux", 4, 12)])
def test_regional_equals_masks_by_hand(kind: str, grid: int, text: int, sets: Any, attach: Any) -> None:
    pipe, files, _ = sets(kind)
    mixture = attach(pipe, files, lw.Regional(MASKS))
    mixed = pipes.latents(pipe)
    experts = {
        expert.name: lw.Expert(expert.name, {p: layer.bank.factors(n) for p, layer in mixture.layers.items()
                                             if layer.bank.factors(n) is not None})
        for n, expert in enumerate(mixture.sources)
    }  # fmt: skip
    mixture.detach()
    hooks = masked_by_hand(pipe, experts, grid, text)
    try:
        assert_close(mixed, pipes.latents(pipe), **CLOSE)
    finally:
        for hook in hooks:
            hook.remove()


def test_schedules_equal_weights_set_by_hand_at_every_step(sets: Any, attach: Any) -> None:
    pipe, files, reference = sets("sd15")
    attach(pipe, {"hero": files["hero"], "ink": files["ink"]}, lw.Sum(0.5, {"hero": "0@0,1@0.5,0.5@1"}))
    reference.set_adapters(["hero", "ink"], [1.0, 0.5])  # the text encoder takes the largest value
    told = pipes.conditions(reference, 1.0)
    scheduler = reference.scheduler
    scheduler.set_timesteps(5)
    latent = pipes.start()
    for t, weight in zip(scheduler.timesteps, [0.0, 0.5, 1.0, 0.75, 0.5], strict=True):
        reference.unet.set_adapters(["hero", "ink"], [weight, 0.5])
        with torch.no_grad():
            latent = scheduler.step(reference.unet(latent, t, **told).sample, t, latent).prev_sample
    assert_close(run(pipe, 5, 1.0), latent, **CLOSE)


def test_weights_of_blocks_equal_set_adapters(textless: Any, attach: Any) -> None:
    pipe, files, reference = textless("sd15")
    hero = {"unet": {"down": 0.3, "mid": 0.9, "up": {"block_0": [0.1, 0.7]}}}
    # diffusers takes the names of attention blocks for whole ones; this LoRA extends these alone
    attach(pipe, {"hero": files["hero"]}, lw.Sum(weights={"hero": hero}))
    reference.set_adapters(["hero"], [hero])
    assert_close(pipes.latents(pipe), pipes.latents(reference), **CLOSE)


def test_lists_hold_for_the_attentions_of_every_block(textless: Any, attach: Any) -> None:
    pipe, files, reference = textless("sd15")
    for hero in ({"unet": {"up": [0.1, 0.7], "down": [0.4]}}, {"unet": {"mid": [0.2], "up": {"block_0": [0.3]}}}):
        mixture = attach(pipe, {"hero": files["hero"]}, lw.Sum(weights={"hero": hero}))
        reference.set_adapters(["hero"], [hero])
        assert_close(pipes.latents(pipe), pipes.latents(reference), **CLOSE)
        mixture.detach()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"unet": {"up": {"block_0": [0.1, 0.2, 0.3]}}}, None),  # as many as a whole UNet may have
        ({"unet": {"up": []}}, r"the list \[\] has no entry of number 0"),
        ({"unet": [0.1, 0.2]}, r"the list \[0\.1, 0\.2\] is for the numbered parts of a block, not for 'unet\."),
    ],
)
def test_lists_without_an_entry_are_refused(weights: Any, message: str | None, textless: Any, attach: Any) -> None:
    pipe, files, _ = textless("sd15")
    mixture = attach(pipe, {"coat": files["coat"]}, lw.Sum())
    if message is None:
        mixture.policy = lw.Sum(weights={"coat": weights})
        return
    with pytest.raises(lw.LoraweaveError, match=message):
        mixture.policy = lw.Sum(weights={"coat": weights})
