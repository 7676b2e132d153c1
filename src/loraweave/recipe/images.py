"""The section ``images`` of a recipe: what gates over a diffusers pipeline are taught by.

```yaml
base: stable-diffusion-v1-5/stable-diffusion-v1-5
experts: {hero: loras/hero.safetensors, ink: loras/ink.safetensors}
images:
  objective: clip
  clip: openai/clip-vit-large-patch14
  prompts: [a knight, ink drawing]
  concepts: {hero: a knight}
  references: {ink: drawings}
train: {steps: 400, batch_size: 2, balance: 0.5}
```

or ``images: {objective: denoising, pictures: {a knight: photos/knight}}``. A prompt that is about some of the experts
names them, ``{text: a knight, experts: [hero]}``: the others are masked while it is painted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe.parts import Part

_BOTH = {"objective", "size", "sample_every"}
_DENOISING = {"pictures"}
_TEXT_ONLY = ("max_input_length", "max_target_length", "gradient_accumulation_steps")


class About(Part):
    """A prompt, and the experts that it is about."""

    text: str = Field(description="what is painted")
    experts: tuple[str, ...] = Field(min_length=1, description="who paints it; the others are masked meanwhile")


class Images(Part):
    """What gates of a pipeline learn from: CLIP's judgement of their pictures, or pictures to denoise."""

    objective: Literal["clip", "denoising"] = Field(description="see loraweave.ClipGuidance and loraweave.Denoising")
    size: tuple[int, int] | None = Field(
        default=None, description="width and height; default: the pipeline's, or the first picture's"
    )
    sample_every: int | None = Field(default=None, ge=1, description="steps between sample pictures; default: none")
    pictures: dict[str, str] = Field(
        default={}, description="denoising: prompt -> folder; a.txt beside a.png is its caption"
    )
    clip: str | None = Field(default=None, description="clip: folder or hub id of a CLIP model")
    prompts: tuple[str | About, ...] = Field(
        default=(), description="clip: what is painted, by all experts or {text: ..., experts: [...]}"
    )
    concepts: dict[str, str] = Field(default={}, description="clip: expert -> phrase; default: its trigger words")
    references: dict[str, str] = Field(
        default={}, description="clip: expert -> folder of pictures, instead of a phrase"
    )
    boxes: dict[str, tuple[float, float, float, float]] = Field(
        default={}, description="clip: expert -> x0, y0, x1, y1 in fractions of the picture"
    )
    global_weight: float = Field(default=1.0, ge=0)
    local_weight: float = Field(default=1.0, ge=0)
    crops: int = Field(default=4, ge=1)
    crop_size: tuple[float, float] = (0.4, 0.8)
    steps: int = Field(default=20, ge=1, description="clip: denoising steps of a run")
    when: tuple[float, float] = (0.3, 0.9)
    guidance: float | None = Field(default=None, description="clip: guidance scale; default: the pipeline's")
    scheduler: str | None = Field(default=None, description="clip: a scheduler of diffusers, by its class")

    @model_validator(mode="after")
    def _one_objective(self) -> Images:
        needed = ("clip", "prompts") if self.objective == "clip" else ("pictures",)
        for name in needed:
            if not getattr(self, name):
                raise LoraweaveError(f"the objective {self.objective!r} needs the field {name!r}")
        foreign = _DENOISING if self.objective == "clip" else set(type(self).model_fields) - _BOTH - _DENOISING
        for name in sorted(foreign & self.model_fields_set):
            raise LoraweaveError(f"the objective {self.objective!r} has no field {name!r}; remove it")
        if self.size is not None and any(side < 8 or side % 8 for side in self.size):
            raise LoraweaveError(f"size: expected width and height in multiples of 8, got {list(self.size)}")
        for name in self.concepts:
            if name in self.references:
                raise LoraweaveError(f"expert {name!r} has both a phrase and pictures; keep one")
        self.lesson()
        return self

    def check(self, names: Iterable[str], train: BaseModel, *, data: bool) -> None:
        """Raise unless the rest of the recipe goes with this section.

        Args:
            names: of the experts.
            train: the recipe's section.
            data: whether the recipe has any.

        Raises:
            LoraweaveError: an unknown expert, or something that language models alone have.
        """
        known = list(names)
        for field in ("concepts", "references", "boxes"):
            for name in getattr(self, field):
                if name not in known:
                    raise LoraweaveError(f"images.{field}: {unknown('expert', name, known)}")
        self.check_prompts(known, "expert")
        if data:
            raise LoraweaveError("data: is for language models; prompts or pictures go into 'images'")
        for name in _TEXT_ONLY:
            if getattr(train, name) is not None:
                raise LoraweaveError(f"train.{name}: is for language models; remove it from a recipe with 'images'")

    def check_prompts(self, known: Iterable[str], kind: str) -> None:
        """Raise :class:`LoraweaveError` if a prompt is about an expert that is not among ``known``, called ``kind``."""
        known = list(known)
        for name in (name for prompt in self.prompts if isinstance(prompt, About) for name in prompt.experts):
            if name not in known:
                raise LoraweaveError(f"images.prompts: {unknown(kind, name, known)}")

    def placed(self, folder: Path, maybe: Callable[[str], str]) -> Images:
        """The same with folders relative to ``folder``; ``maybe`` knows what may be on the hub."""

        def inside(folders: dict[str, str]) -> dict[str, str]:
            return {name: str(folder / Path(place).expanduser()) for name, place in folders.items()}

        clip = None if self.clip is None else maybe(self.clip)
        placed: dict[str, Any] = {
            "clip": clip,
            "references": inside(self.references),
            "pictures": inside(self.pictures),
        }
        return self.model_copy(update={name: value for name, value in placed.items() if value})

    def lesson(self) -> tuple[Any, Any]:
        """Data and objective for :func:`loraweave.train_images`.

        Raises:
            LoraweaveError: an option that the objective refuses.
        """
        from loraweave.training.images.objectives import ClipGuidance, Denoising

        if self.objective == "denoising":
            return self.pictures, Denoising(size=None if self.size is None else (self.size[1], self.size[0]))
        own = {"objective", "size", "sample_every", "pictures", "prompts", "clip", "concepts", "references"}
        options = {name: getattr(self, name) for name in type(self).model_fields if name not in own}
        call = {} if self.size is None else {"width": self.size[0], "height": self.size[1]}
        concepts = self.concepts | {name: Path(place) for name, place in self.references.items()}
        prompts = [(p.text, p.experts) if isinstance(p, About) else p for p in self.prompts]
        return prompts, ClipGuidance(self.clip, concepts=concepts, call=call, **options)
