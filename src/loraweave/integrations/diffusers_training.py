"""A pipeline's own run as something to differentiate: the estimate of the clean picture, and the predicted noise.

The pipeline is called as it is, with its own encoding of prompts, guidance and decoding; only its scheduler is a copy
that stops the run where it is told to, so that every family of pipelines that can be interrupted works alike.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.integrations.diffusers import settings_of
from loraweave.mixing.stream import Arguments

FLOW = "flow_prediction"


@dataclass(frozen=True)
class Noised:
    """Latents with noise, and what a denoiser should say of them.

    Attributes:
        sample: ``[rows, channels, height, width]``, what the denoiser is shown.
        timestep: ``[rows]``, on the scheduler's scale.
        target: like ``sample``.
    """

    sample: Tensor
    timestep: Tensor
    target: Tensor


def check_pipeline(pipe: Any) -> None:
    """Raise unless gates can be trained in this pipeline."""
    if not isinstance(getattr(type(pipe), "interrupt", None), property) or getattr(pipe, "vae", None) is None:
        raise LoraweaveError(
            f"{type(pipe).__name__}: gates cannot be trained here; it needs a VAE and runs that can be interrupted, as "
            "Stable Diffusion 1.5, XL, 3 and Flux have"
        )
    if hasattr(pipe.scheduler, "precondition_outputs"):
        raise LoraweaveError(f"scheduler {type(pipe.scheduler).__name__}: EDM's own scaling is not supported here")


def clean_estimate(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """The clean latents that a denoiser's prediction means, any prediction type: DDPM Eq. 15 and its relatives.

    Samples of schedulers that scale what the denoiser sees (Euler) are brought to the form ``sqrt(a) x0 + sqrt(1-a)
    noise`` first; flows have ``(1-s) x0 + s noise``.

    Args:
        scheduler: before its step.
        prediction: what the scheduler's ``step`` is given; a learned variance in further channels is left out.
        timestep: of this step.
        sample: the latents, as the scheduler keeps them.

    Raises:
        LoraweaveError: the scheduler has an unknown kind of prediction.
    """
    if prediction.ndim == 4 and prediction.shape[1] == 2 * sample.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]
    kind = scheduler.config.get("prediction_type", FLOW if is_flow(scheduler) else "epsilon")
    z, v = sample.float(), prediction.float()
    if z.dtype != sample.dtype and sample.dtype == torch.float64:
        z, v = sample, prediction.double()
    sigma = _sigma(scheduler, timestep)
    if kind == FLOW or is_flow(scheduler):
        assert sigma is not None
        return (z - sigma.to(z) * v).to(sample.dtype)
    if sigma is None:
        a = scheduler.alphas_cumprod[int(timestep)].to(z)
    else:
        a = 1 / (1 + sigma.to(z) ** 2)
        if _scales_input(scheduler):
            z = z * a.sqrt()
    if kind == "epsilon":
        clean = (z - (1 - a).sqrt() * v) / a.sqrt()
    elif kind == "v_prediction":
        clean = a.sqrt() * z - (1 - a).sqrt() * v
    elif kind == "sample":
        clean = v
    else:
        raise LoraweaveError(f"scheduler {type(scheduler).__name__}: unknown prediction type {kind!r}")
    found: Tensor = clean.to(sample.dtype)
    return found


def is_flow(scheduler: Any) -> bool:
    """Whether samples are ``(1-s) x0 + s noise`` and the denoiser predicts ``noise - x0``."""
    flows = bool(scheduler.config.get("use_flow_sigmas")) or scheduler.config.get("prediction_type") == FLOW
    return flows or "FlowMatch" in type(scheduler).__name__


def _scales_input(scheduler: Any) -> bool:
    """Whether samples are ``x0 + s noise``: Euler, Heun, KDPM2, LMS; DPM-Solver++ and UniPC scale samples too."""
    return not hasattr(scheduler, "_sigma_to_alpha_sigma_t")


def _sigma(scheduler: Any, timestep: Any) -> Tensor | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or not hasattr(scheduler, "index_for_timestep"):
        return None
    index = scheduler.step_index
    return sigmas[scheduler.index_for_timestep(timestep) if index is None else index]


# ---------------------------------------------------------------- running a pipeline with gradients


def estimated_pictures(
    pipe: Any,
    scheduler: Any,
    prompts: Sequence[str],
    *,
    until: float,
    generators: Sequence[Any],
    call: Mapping[str, Any],
) -> Tensor:
    """Pictures as the pipeline expects them at one step of its run, with gradient through that step and the decoder.

    Steps before run without gradient; prompts are encoded with it, where text encoders have gates.

    Args:
        pipe: with a mixture attached.
        scheduler: a copy to run with.
        prompts: one a row.
        until: at which part of the run, from 0 (first step) to 1.
        generators: one a row.
        call: further arguments of the pipeline's call.

    Returns:
        ``[rows, 3, height, width]`` between 0 and 1.
    """
    denoiser, state = _denoiser(pipe), {"done": 0, "stop": -1}

    def before(_: nn.Module, __: Any) -> None:
        if state["stop"] < 0:
            steps = len(probe.timesteps)
            state["stop"] = min(int(until * steps), steps - 1)
        torch.set_grad_enabled(state["done"] == state["stop"])

    probe = copy.deepcopy(scheduler)
    original = probe.step

    @functools.wraps(original)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if state["done"] < state["stop"]:
            state["done"] += 1
            return original(model_output, timestep, sample, *args, **kwargs)
        pipe._interrupt = True
        return (clean_estimate(probe, model_output, timestep, sample),)

    probe.step = step
    handle = denoiser.register_forward_pre_hook(before)
    try:
        with swapped(pipe, scheduler=probe), torch.enable_grad():
            said = {"prompt": list(prompts), "output_type": "pt", "generator": list(generators)} | dict(call)
            pictures: Tensor = _undecorated(pipe)(pipe, **said).images
    finally:
        handle.remove()
    return pictures


def predictions(
    pipe: Any, scheduler: Any, prompts: Sequence[str], noised: Noised, *, call: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """What the denoiser says of noised latents under the pipeline's own conditions, with gradient; and the target.

    Args:
        pipe: with a mixture attached.
        scheduler: a copy to run with.
        prompts: one a row.
        noised: what is shown instead of what the pipeline would show at its first step.
        call: further arguments of the pipeline's call.

    Returns:
        Prediction and target, alike in shape (packed, where the denoiser reads packed cells).
    """
    denoiser = _denoiser(pipe)
    reads = Arguments(denoiser)
    first = reads.names()[0]
    rows, channels, height, width = noised.sample.shape
    target = noised.target

    def shown(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal target
        sample, own, t = noised.sample, reads.get(first, args, kwargs), reads.get("timestep", args, kwargs)
        if own.ndim == 3 and hasattr(pipe, "_pack_latents"):
            sample = pipe._pack_latents(sample, rows, channels, height, width)
            target = pipe._pack_latents(target, rows, channels, height, width)
        if own.shape != sample.shape:
            raise LoraweaveError(
                f"{type(pipe).__name__}: its denoiser reads {list(own.shape)}, a picture's latents are "
                f"{list(sample.shape)}; this pipeline cannot be trained by its own pictures"
            )
        # Some transformers are given the timestep divided by a thousand.
        scale = float(t.flatten()[0]) / float(probe.timesteps[0])
        new = {first: sample.to(own), "timestep": (noised.timestep * scale).to(own.device)}
        if t.is_floating_point():
            new["timestep"] = new["timestep"].to(t.dtype)
        names = reads.names()
        return tuple(new.get(name, value) for name, value in zip(names, args, strict=False)), {
            name: new.get(name, value) for name, value in kwargs.items()
        }

    def said(_: nn.Module, __: Any, output: Any) -> None:
        raise _EnoughError(output[0])

    probe = copy.deepcopy(scheduler)
    with ExitStack() as stack:
        stack.enter_context(swapped(pipe, scheduler=probe))
        stack.enter_context(torch.enable_grad())
        # Before all other hooks, so that these see what is shown.
        handles = [
            denoiser.register_forward_pre_hook(shown, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(said),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        size = {"height": height * pipe.vae_scale_factor, "width": width * pipe.vae_scale_factor}
        plain = {"prompt": list(prompts), "output_type": "latent", "guidance_scale": 1.0, "num_inference_steps": 2}
        try:
            _undecorated(pipe)(pipe, **plain, **size, **call)
        except _EnoughError as enough:
            prediction = enough.prediction
        else:
            raise LoraweaveError(f"{type(pipe).__name__}: never called its denoiser")
    if prediction.ndim == 4 and prediction.shape[1] == 2 * channels:
        prediction = prediction.chunk(2, dim=1)[0]
    return prediction, target


class _EnoughError(Exception):
    """Carries a prediction out of a pipeline's call."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction


# ---------------------------------------------------------------- pictures and noise


@torch.no_grad()
def encoded(pipe: Any, pictures: Tensor) -> Tensor:
    """Pictures ``[rows, 3, height, width]`` between 0 and 1 -> latents as denoisers know them, the VAE's means."""
    vae = pipe.vae
    upcast = bool(vae.config.get("force_upcast")) and vae.dtype == torch.float16
    before = vae.dtype
    if upcast:
        vae.to(torch.float32)
    found: Tensor = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
    if upcast:
        vae.to(before)
    scaled: Tensor = (found - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled


def noised(pipe: Any, latents: Tensor, noise: Tensor, u: Tensor) -> Noised:
    """Noise latents as in a denoiser's own training.

    Args:
        pipe: whose scheduler says which noise there is.
        latents, noise: ``[rows, channels, height, width]``.
        u: ``[rows]`` standard normal numbers: flows take their sigmoid as timestep (logit-normal, Stable Diffusion 3),
            other schedulers their distribution function (uniform).
    """
    from diffusers import DDPMScheduler

    scheduler = pipe.scheduler
    steps = int(scheduler.config.num_train_timesteps)
    if is_flow(scheduler):
        index = (torch.sigmoid(u) * steps).long().clamp(max=steps - 1)
        fresh = type(scheduler).from_config({**settings_of(scheduler), "use_dynamic_shifting": False})
        s = fresh.sigmas[index].to(latents).view(-1, 1, 1, 1)
        return Noised((1 - s) * latents + s * noise, fresh.timesteps[index].to(latents), noise - latents)
    ddpm = DDPMScheduler.from_config(settings_of(scheduler))
    t = (torch.special.ndtr(u) * steps).long().clamp(max=steps - 1).to(latents.device)
    kind = ddpm.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise LoraweaveError(f"scheduler {type(scheduler).__name__}: unknown prediction type {kind!r}")
    target = {"epsilon": noise, "sample": latents}.get(kind)
    target = ddpm.get_velocity(latents, noise, t) if target is None else target
    return Noised(ddpm.add_noise(latents, noise, t), t, target)


# ---------------------------------------------------------------- the pipeline while it is trained


@contextmanager
def swapped(pipe: Any, **parts: Any) -> Iterator[None]:
    """Other parts for a while: a scheduler, no safety checker (which looks at finished pictures alone)."""
    parts = {"safety_checker": None, **parts} if getattr(pipe, "safety_checker", None) is not None else parts
    before = {name: getattr(pipe, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(pipe, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)


@contextmanager
def prepared(pipe: Any, checkpointing: bool) -> Iterator[None]:
    """The pipeline in evaluation mode, silent, with gradient checkpointing in denoiser and VAE if asked for."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    training = [model.training for model in models]
    turned = [m for m in (_denoiser(pipe), pipe.vae) if checkpointing and not m.is_gradient_checkpointing]
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    for model in models:
        model.eval()
    for model in turned:
        model.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(**(bar | {"disable": True}))
    learned = [p for p in pipe.vae.parameters() if p.requires_grad]
    pipe.vae.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        pipe.set_progress_bar_config(**(bar or {"disable": False}))
        for model in turned:
            model.disable_gradient_checkpointing()
        for model, was in zip(models, training, strict=True):
            model.train(was)


def _denoiser(pipe: Any) -> Any:
    part = getattr(pipe, "unet", None)
    part = getattr(pipe, "transformer", None) if part is None else part
    return getattr(part, "_orig_mod", part)


def _undecorated(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call without its ``torch.no_grad``."""
    call: Callable[..., Any] = inspect.unwrap(type(pipe).__call__)
    return call
