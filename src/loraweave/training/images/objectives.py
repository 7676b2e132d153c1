"""What image gates are taught by: CLIP's judgement of pictures, or noise prediction on given ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError, unknown
from loraweave.integrations import clip as judges
from loraweave.integrations import diffusers_training as runs
from loraweave.integrations.diffusers import scheduler_named
from loraweave.mixture import Mixture
from loraweave.policies import checks
from loraweave.training.images import pictures as gallery

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Draw:
    """What one row of a batch is made from: nothing else is random.

    Attributes:
        seed: of everything drawn for this row.
        batch_seed: of what is drawn once for the batch, the same in all processes.
        item: number of the item of the data.
    """

    seed: int
    batch_seed: int
    item: int


class Lesson(Protocol):
    """An objective made ready for one mixture and its data."""

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def experts(self) -> Sequence[tuple[str, ...] | None]:
        """Of each item, the experts at work while it is taught; ``None`` for all."""

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        """The mean loss of a batch, a scalar with gradient."""


@dataclass(frozen=True)
class ClipGuidance:
    """Unsupervised guidance by CLIP, global and local (MoLE, section 3.4; the paper gives no equation for it).

    ``global_weight (1 - cos(picture, prompt)) + local_weight mean_i (1 - max_crops cos(crop, concept i))``: the whole
    picture shall show the prompt, and every concept shall be seen somewhere, or in its box. Pictures are the pipeline's
    estimates at a step drawn from ``when``; that step and the decoder have gradients. A prompt that is given with the
    experts it is about is painted by these alone, and only their concepts are looked for.

    Args:
        clip: folder or hub id of a CLIP model, or a :class:`loraweave.integrations.clip.Clip`.
        concepts: expert -> a phrase, or a folder of reference pictures, or a list of pictures; default: the trigger
            words in the experts' files.
        global_weight, local_weight: of the two losses.
        crops: how many random squares of a picture are looked at for concepts without a box.
        crop_size: smallest and largest side of the crops, as fractions of the picture's.
        boxes: expert -> where its concept shall be: ``x0, y0, x1, y1`` in fractions of the picture.
        steps: denoising steps of a run.
        when: first and last part of a run in which the step with gradient is drawn, from 0 to 1.
        guidance: guidance scale; default: the pipeline's.
        scheduler: class of diffusers, e.g. ``DDPMScheduler``; default: the pipeline's own scheduler.
        call: further arguments of the pipeline's call, such as ``height`` and ``width``.
    """

    clip: Any
    concepts: Mapping[str, Any] = field(default_factory=dict)
    global_weight: float = 1.0
    local_weight: float = 1.0
    crops: int = 4
    crop_size: tuple[float, float] = (0.4, 0.8)
    boxes: Mapping[str, Box] = field(default_factory=dict)
    steps: int = 20
    when: tuple[float, float] = (0.3, 0.9)
    guidance: float | None = None
    scheduler: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("global_weight", "local_weight"):
            checks.finite("clip guidance", name, getattr(self, name), above=-1e-30)
        if self.global_weight == self.local_weight == 0:
            raise LoraweaveError("clip guidance: global_weight and local_weight are both 0; nothing would be learned")
        for name in ("crops", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise LoraweaveError(
                    f"clip guidance {name}: expected a whole number of at least 1, got {getattr(self, name)!r}"
                )
        for name, lowest in (("when", 0.0), ("crop_size", 1e-6)):
            pair = getattr(self, name)
            if len(pair) != 2 or not lowest <= pair[0] <= pair[1] <= 1:
                raise LoraweaveError(f"clip guidance {name}: expected two rising numbers within 0 and 1, got {pair!r}")
        for name, box in self.boxes.items():
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise LoraweaveError(
                    f"clip guidance boxes: {name!r}: expected x0, y0, x1, y1 in fractions of the picture, got {box!r}"
                )

    @classmethod
    def paper(cls, clip: Any, **options: Any) -> ClipGuidance:
        """50 DDPM steps and guidance scale 7.5 (MoLE, section 4.1), with ``**loraweave.training.images.PAPER``."""
        return cls(clip, **{"steps": 50, "guidance": 7.5, "scheduler": "DDPMScheduler", **options})

    def lesson(self, mixture: Mixture, data: Any, device: torch.device) -> Lesson:
        """Ready for ``data``: a list of prompts, or of pairs of a prompt and the experts that it is about.

        Raises:
            LoraweaveError: no prompts, no CLIP, an expert without a concept, or an unknown expert.
        """
        items = [data] if isinstance(data, str) else list(data) if isinstance(data, Iterable) else []
        asked = [(item, None) if isinstance(item, str) else _pair(item) for item in items]
        if not asked or not all(prompt.strip() for prompt, _ in asked):
            raise LoraweaveError("prompts: expected a list of texts, at least one, none of them blank")
        for _, names in asked:
            for name in names or ():
                if name not in mixture.experts:
                    raise LoraweaveError(f"prompts: {unknown('expert', name, mixture.experts)}")
        return _Guided(self, mixture, [(prompt, _in_order(names, mixture)) for prompt, names in asked], device)


def _pair(item: Any) -> tuple[str, tuple[str, ...]]:
    match item:
        case (str() as prompt, [*names]) if names and all(isinstance(name, str) for name in names):
            return prompt, tuple(dict.fromkeys(names))
    raise LoraweaveError(f"prompts: expected a text, or a pair of a text and the names of some experts, got {item!r}")


def _in_order(names: tuple[str, ...] | None, mixture: Mixture) -> tuple[str, ...] | None:
    """One way to say it, whatever the order; ``None`` for all."""
    found = tuple(name for name in mixture.experts if names is None or name in names)
    return None if found == mixture.experts else found


class _Guided:
    def __init__(
        self,
        options: ClipGuidance,
        mixture: Mixture,
        asked: Sequence[tuple[str, tuple[str, ...] | None]],
        device: torch.device,
    ) -> None:
        self.options, self.pipe = options, mixture.pipeline
        self.prompts = prompts = [prompt for prompt, _ in asked]
        self.experts = [names for _, names in asked]
        for name in (*options.concepts, *options.boxes):
            if name not in mixture.experts:
                raise unknown("expert", name, mixture.experts)
        concepts = _concepts(options, mixture) if options.local_weight else {}
        self.clip = judges.load_clip(options.clip).to(device)
        self.wanted = self.clip.texts(prompts)
        self.concepts = {name: self._concept(name, concept) for name, concept in concepts.items()}
        self.scheduler = scheduler_named(self.pipe, options.scheduler)

    def _concept(self, name: str, concept: Any) -> Tensor:
        """``[width]``, a unit vector: of the phrase, or the mean of the pictures'."""
        if isinstance(concept, str) and not Path(concept).is_dir():
            return self.clip.texts([concept])[0]
        found = gallery.files_of(Path(concept)) if isinstance(concept, str | Path) else list(concept)
        if not found:
            raise LoraweaveError(f"concepts: {name!r} has no pictures; give a phrase or at least one picture")
        side = (self.clip.size, self.clip.size)
        opened = [gallery.pixels(gallery.open_picture(p, f"concepts: {name!r}"), side) for p in found]
        with torch.no_grad():
            mean = self.clip.pictures(torch.stack(opened)).mean(0)
        unit: Tensor = mean / mean.norm()
        return unit

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        options = self.options
        low, high = options.when
        place = torch.rand((), generator=torch.Generator().manual_seed(draws[0].batch_seed))
        call: dict[str, Any] = {"num_inference_steps": options.steps} | dict(options.call)
        if options.guidance is not None:
            call["guidance_scale"] = options.guidance
        painted = runs.estimated_pictures(
            self.pipe,
            self.scheduler,
            [self.prompts[draw.item] for draw in draws],
            until=low + (high - low) * float(place),
            generators=[torch.Generator().manual_seed(draw.seed) for draw in draws],
            call=call,
        )
        return self.judged(painted, draws)

    def judged(self, painted: Tensor, draws: Sequence[Draw]) -> Tensor:
        """The loss of pictures ``[rows, 3, height, width]``."""
        options, total = self.options, torch.zeros((), device=painted.device)
        if options.global_weight:
            wanted = self.wanted[[draw.item for draw in draws]]
            seen = (self.clip.pictures(painted) * wanted).sum(-1)
            total = total + options.global_weight * (1 - seen).mean()
        if options.local_weight:
            local = [self.local(picture, draw) for picture, draw in zip(painted, draws, strict=True)]
            total = total + options.local_weight * torch.stack(local).mean()
        return total

    def local(self, picture: Tensor, draw: Draw) -> Tensor:
        names = self.experts[draw.item]
        about = [name for name in self.concepts if names is None or name in names]
        boxes = {name: box for name, box in self.options.boxes.items() if name in about}
        losses = []
        free = [name for name in about if name not in boxes]
        if free:
            generator = torch.Generator().manual_seed(draw.seed)
            seen = self.clip.pictures(self.cut(picture, random_boxes(self.options, generator)))
            losses += [1 - (seen @ self.concepts[name]).max() for name in free]
        for name in boxes:
            seen = self.clip.pictures(self.cut(picture, [boxes[name]]))
            losses.append(1 - (seen @ self.concepts[name])[0])
        return torch.stack(losses).mean()

    def cut(self, picture: Tensor, boxes: Sequence[Box]) -> Tensor:
        """``[boxes, 3, side, side]``: crops at the size that CLIP reads."""
        side = (self.clip.size, self.clip.size)
        crops = []
        for box in boxes:
            top, bottom = _span(box[1], box[3], picture.shape[1])
            left, right = _span(box[0], box[2], picture.shape[2])
            crop = picture[None, :, top:bottom, left:right].float()
            crops.append(
                torch.nn.functional.interpolate(crop, side, mode="bicubic", antialias=True, align_corners=False)
            )
        return torch.cat(crops).clamp(0, 1)


def random_boxes(options: ClipGuidance, generator: torch.Generator) -> list[Box]:
    """Squares (in fractions of the picture) of random sides and places."""
    smallest, largest = options.crop_size
    boxes = []
    for _ in range(options.crops):
        u, v, w = torch.rand(3, generator=generator).tolist()
        side = smallest + (largest - smallest) * u
        x, y = v * (1 - side), w * (1 - side)
        boxes.append((x, y, x + side, y + side))
    return boxes


def _span(start: float, stop: float, length: int) -> tuple[int, int]:
    first = min(int(start * length), length - 1)
    return first, max(first + 1, min(length, round(stop * length)))


def _concepts(options: ClipGuidance, mixture: Mixture) -> dict[str, Any]:
    found = {}
    for expert in mixture.sources:
        triggers = expert.report.triggers if expert.report is not None else []
        concept = options.concepts.get(expert.name, ", ".join(triggers))
        if isinstance(concept, str) and not concept.strip():
            raise LoraweaveError(
                f"concepts: none for expert {expert.name!r}, and its file names no trigger words; give "
                f"concepts={{{expert.name!r}: 'a phrase'}} or a folder of pictures, or local_weight=0"
            )
        found[expert.name] = concept
    return found


@dataclass(frozen=True)
class Denoising:
    """The denoiser's own training objective on the concepts' pictures: mean squared error of its prediction.

    Timesteps are uniform, of flows logit-normal (Stable Diffusion 3); the target is what the scheduler's prediction
    type says: noise, velocity, or noise minus picture. Prompts are encoded under the mixture, without guidance.

    Args:
        size: height and width that pictures are brought to; default: the first picture's, in multiples of 8.
        call: further arguments of the pipeline's call.
    """

    size: tuple[int, int] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or any(s < 8 or s % 8 for s in self.size)):
            raise LoraweaveError(f"denoising size: expected height and width in multiples of 8, got {self.size!r}")

    def lesson(self, mixture: Mixture, data: Any, device: torch.device) -> Lesson:
        """Ready for ``data``: prompt -> folder, or pairs of picture and prompt.

        Raises:
            LoraweaveError: no pictures, or some that cannot be read.
        """
        return self.lesson_of(mixture.pipeline, data, device)

    def lesson_of(self, pipe: Any, data: Any, device: torch.device) -> Lesson:
        """As :meth:`lesson`, of a pipeline without a mixture."""
        return _Denoised(self, pipe, gallery.read_pictures(data, self.size), device)


class _Denoised:
    def __init__(self, options: Denoising, pipe: Any, pictures: list[gallery.Captioned], device: torch.device) -> None:
        self.options, self.pipe = options, pipe
        self.prompts = [picture.prompt for picture in pictures]
        self.experts = [None] * len(pictures)
        self.latents = [runs.encoded(self.pipe, p.pixels.unsqueeze(0).to(device))[0].cpu() for p in pictures]

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        latents = torch.stack([self.latents[draw.item] for draw in draws])
        noise, u = [], []
        for draw in draws:
            generator = torch.Generator().manual_seed(draw.seed)
            noise.append(torch.randn(latents.shape[1:], generator=generator, dtype=torch.float32))
            u.append(torch.randn((), generator=generator))
        shown = runs.noised(self.pipe, latents, torch.stack(noise).to(latents), torch.stack(u))
        prompts = [self.prompts[draw.item] for draw in draws]
        said, target = runs.predictions(self.pipe, self.pipe.scheduler, prompts, shown, call=self.options.call)
        return torch.nn.functional.mse_loss(said.float(), target.to(said.device).float())
