"""SVDiff's training: shifts of singular values, learned from a concept's own pictures (Han et al. 2023).

https://arxiv.org/abs/2303.11305, section 3.2: the denoising loss, with ``W = U diag(relu(sigma + delta)) V^T`` and the
gradient in ``delta`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loraweave.errors import LoraweaveError, unknown
from loraweave.integrations import diffusers_training as runs
from loraweave.integrations.svdiff import as_matrix
from loraweave.mixing.layer import MixingLayer
from loraweave.policies import checks
from loraweave.training.images.objectives import Denoising
from loraweave.training.images.train import draws_of

SHIFTED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
"""Kinds of modules whose weights get shifts."""


@dataclass(frozen=True)
class TrainedShifts:
    """What training found.

    Attributes:
        shifts: name of the model in the pipeline -> module -> shifts, float32 on the CPU, as
            :func:`loraweave.integrations.svdiff.apply_shifts` and ``write_shifts`` take them.
        losses: of each step.
    """

    shifts: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    losses: Sequence[float] = field(repr=False)


class Spectral:
    """One weight by its decomposition, and the shifts that are learned.

    Attributes:
        delta: ``[k]``, the shifts of the ``k`` singular values, largest first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        kept = torch.promote_types(weight.dtype, torch.float32)
        U, sigma, Vh = torch.linalg.svd(as_matrix(weight.detach()).double(), full_matrices=False)
        self.U, self.sigma, self.Vh = (part.to(kept) for part in (U, sigma, Vh))
        self.delta = nn.Parameter(torch.zeros_like(self.sigma))

    def put(self) -> None:
        """Give the module ``U diag(relu(sigma + delta)) V^T`` as its weight, with gradient."""
        # What the shifts change, so that the weight is exactly the model's own where they are zero.
        change = (self.U * (torch.relu(self.sigma + self.delta) - self.sigma)) @ self.Vh
        shifted = self.weight.detach().to(change.dtype) + change.view(self.weight.shape)
        self.module._parameters.pop("weight", None)
        self.module.__dict__["weight"] = shifted.to(self.weight.dtype)

    def restore(self) -> None:
        self.module.__dict__.pop("weight", None)
        # Registered again it would stand behind the bias, and a model's parameters have an order.
        others = {name: p for name, p in self.module._parameters.items() if name != "weight"}
        self.module._parameters.clear()
        self.module._parameters.update({"weight": self.weight, **others})


def train_shifts(
    pipe: Any,
    data: Any,
    objective: Denoising | None = None,
    *,
    parts: Sequence[str] = ("unet",),
    steps: int = 500,
    learning_rate: float = 1e-3,
    norm_learning_rate: float = 1e-6,
    batch_size: int = 1,
    seed: int = 0,
    gradient_checkpointing: bool = True,
    progress: bool = True,
) -> TrainedShifts:
    """Learn one concept's spectral shifts by the denoising loss; the pipeline is left as it was.

    Shifted are all linear, convolution and norm weights of ``parts``. All that is drawn depends on ``seed``, step and
    row alone. The optimiser is Adam at a constant rate, without weight decay.

    Args:
        pipe: a diffusers pipeline; nothing may be attached to it.
        data: the concept's pictures: prompt -> folder, or pairs of picture and prompt.
        objective: size of the pictures and arguments of the pipeline's call.
        parts: names of models in the pipeline, such as ``unet`` or ``text_encoder``.
        steps: optimiser steps.
        learning_rate: for matrices and convolutions, on the scale of singular values.
        norm_learning_rate: for norms' weights, which have a single shift each.
        batch_size: pictures per step.
        seed: of noise, timesteps and the order of pictures.
        gradient_checkpointing: compute the denoiser again instead of keeping what it computed.
        progress: show a progress bar.

    Raises:
        LoraweaveError: bad options or data, a part the pipeline lacks, one with experts attached, or a loss that is not
            finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        checks.whole("svdiff", name, value)
    for name, rate in (("learning_rate", learning_rate), ("norm_learning_rate", norm_learning_rate)):
        checks.finite("svdiff", name, rate, above=0)
    runs.check_pipeline(pipe)
    spectral = {part: _decomposed(pipe, part) for part in dict.fromkeys(parts)}
    every = [one for part in spectral.values() for one in part.values()]
    if not every:
        raise LoraweaveError("parts: there is nothing to train; name a model of the pipeline, e.g. parts=('unet',)")
    norms = [one.delta for one in every if one.weight.ndim == 1]
    others = [one.delta for one in every if one.weight.ndim > 1]
    groups = [{"params": others, "lr": learning_rate}, {"params": norms, "lr": norm_learning_rate}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    losses: list[float] = []
    with runs.prepared(pipe, gradient_checkpointing), _frozen(pipe), _restored(every):
        lesson = (objective or Denoising()).lesson_of(pipe, data, pipe.device)
        for step in tqdm(range(steps), desc="training shifts", unit="step", disable=not progress):
            for one in every:
                one.put()
            loss = lesson.loss(list(draws_of(seed, step, batch_size, len(lesson.prompts))))
            if not torch.isfinite(loss):
                raise LoraweaveError(
                    f"svdiff: the loss at step {step + 1} is not finite; lower the learning rate, or train in full "
                    "precision"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    found = {
        part: {name: one.delta.detach().float().cpu() for name, one in modules.items()}
        for part, modules in spectral.items()
    }
    return TrainedShifts(found, losses)


def _decomposed(pipe: Any, part: str) -> dict[str, Spectral]:
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    if part not in models:
        raise unknown("part", part, models)
    model = models[part]
    if any(isinstance(module, MixingLayer) for module in model.modules()):
        raise LoraweaveError(f"svdiff: experts are attached to {part!r}; call mixture.detach() first")
    return {
        name: Spectral(module)
        for name, module in model.named_modules()
        if isinstance(module, SHIFTED) and module.weight is not None
    }


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    learned = [
        parameter
        for model in pipe.components.values()
        if isinstance(model, nn.Module)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def _restored(spectral: Sequence[Spectral]) -> Iterator[None]:
    try:
        yield
    finally:
        for one in spectral:
            one.restore()
