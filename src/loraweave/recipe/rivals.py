"""Contestants of pictures that are no mixtures: what stands in ``compare`` for them.

```yaml
compare:
  inversion: {textual_inversion: {<hero>: embeddings/hero.safetensors}, words: {sks hero: <hero>}}
  custom: {custom_diffusion: trained/custom, words: {sks hero: <new1> hero}}
  booth: {dreambooth: trained/booth}
  shifts: {svdiff: {hero: shifts/hero.safetensors, coat: shifts/coat.safetensors}}
  fused: {fuse: {prompts: {hero: [sks hero], coat: [a yellow coat]}, weights: {coat: 0.8}}}
```
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from loraweave import zoo
from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe.parts import Part

if TYPE_CHECKING:
    from loraweave.experts.types import Expert
    from loraweave.integrations.rivals import Loading

LOADED = ("textual_inversion", "custom_diffusion", "dreambooth", "svdiff")
KINDS = (*LOADED, "fuse")


class Fusion(Part):
    """Gradient fusion of the recipe's LoRAs into one: see :func:`loraweave.fuse`."""

    prompts: dict[str, tuple[str, ...]] = Field(
        default={}, description="expert -> what is painted with it alone; default: the test bed's trigger words"
    )
    weights: dict[str, float] = Field(default={}, description="strength of some experts; the others have 1")
    rank: int | None = Field(default=None, ge=1, description="of the result at most; default: all there is")
    ridge: float = Field(default=1e-6, gt=0)
    steps: int = Field(default=30, ge=1, description="denoising steps of each prompt")
    seed: int = Field(default=0, ge=0)

    @field_validator("prompts", mode="before")
    @classmethod
    def _listed(cls, prompts: Any) -> Any:
        if not isinstance(prompts, Mapping):
            return prompts
        return {name: (said,) if isinstance(said, str) else said for name, said in prompts.items()}

    def loading(
        self, pipe: Any, experts: Mapping[str, str | Expert], default: Mapping[str, str], call: Mapping[str, Any]
    ) -> Loading:
        """The block in which ``pipe`` paints with the fused LoRA; it is made on entering.

        Args:
            pipe: with nothing attached to it.
            experts: all that are fused.
            default: expert -> prompt, for those that ``prompts`` does not have.
            call: further arguments of the pipeline's call.

        Raises:
            LoraweaveError: an expert has no prompt.
        """
        from loraweave.integrations.rivals import Loading

        prompts = {**{name: (text,) for name, text in default.items()}, **self.prompts}
        for name in experts:
            if not prompts.get(name):
                raise LoraweaveError(f"fuse.prompts: none for expert {name!r}; write what it paints: {{{name}: [...]}}")
        data = {name: prompts[name] for name in experts}
        return Loading(self._painting(pipe, experts, data, call))

    @contextmanager
    def _painting(
        self, pipe: Any, experts: Mapping[str, str | Expert], data: Mapping[str, Any], call: Mapping[str, Any]
    ) -> Iterator[None]:
        from loraweave.mixture import attach
        from loraweave.policies import Sum
        from loraweave.training.fuse import fuse

        own = {name: weight for name, weight in self.weights.items() if name in experts}
        options: dict[str, Any] = {
            "rank": self.rank,
            "ridge": self.ridge,
            "seed": self.seed,
            "progress": sys.stderr.isatty(),
        }
        call = {**call, "num_inference_steps": self.steps}
        mixture = attach(pipe, {"fused": fuse(pipe, experts, data, weights=own, call=call, **options)}, Sum())
        try:
            yield
        finally:
            mixture.detach()


class Rival(Part):
    """A contestant that is no mixture; at most one of the kinds."""

    textual_inversion: dict[str, str] = Field(
        default={},
        description="pictures: new word -> its safetensors file, or a folder with learned_embeds.safetensors",
    )
    custom_diffusion: str | None = Field(default=None, description="pictures: folder of diffusers' training script")
    dreambooth: str | None = Field(default=None, description="pictures: folder of a pipeline, or of its denoiser")
    svdiff: dict[str, str] = Field(
        default={},
        description="pictures: expert -> file or folder of spectral shifts, or zoo:images/shifts/NAME",
    )
    fuse: Fusion | None = Field(default=None, description="pictures: the experts, fused into one LoRA")
    words: dict[str, str] = Field(default={}, description="what it reads instead of some words of the prompts")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if kind in self.model_fields_set]
        for kind in given:
            if getattr(self, kind) in (None, {}):
                raise LoraweaveError(f"{kind}: expected what it is made of, got nothing")
        if len(given) > 1:
            raise LoraweaveError(f"expected one of {', '.join(given)}; give each a label of its own")
        if self.words and self.kind not in LOADED:
            raise LoraweaveError(f"words: they go with {', '.join(LOADED)}")
        if not all(self.words):
            raise LoraweaveError("words: expected words to replace, got an empty text")
        return self

    @field_validator("svdiff")
    @classmethod
    def _bundled(cls, svdiff: dict[str, str]) -> dict[str, str]:
        for source in svdiff.values():
            zoo.local(source)  # raises for a bundled one that there is not
        return svdiff

    @property
    def hangs_on_set(self) -> bool:
        """Whether every set of experts needs a loading of its own."""
        return bool(self.svdiff) or self.fuse is not None

    @property
    def kind(self) -> str | None:
        """Which of the kinds it is; ``None`` for none."""
        return next((kind for kind in KINDS if kind in self.model_fields_set), None)

    def check(self, label: str, experts: Iterable[str]) -> None:
        """Raise :class:`LoraweaveError` if it names an expert that the recipe does not have."""
        known = list(experts)
        fields: dict[str, Iterable[str]] = {"svdiff": self.svdiff}
        if self.fuse is not None:
            fields |= {"fuse.prompts": self.fuse.prompts, "fuse.weights": self.fuse.weights}
        for field, named in fields.items():
            for name in named:
                if name not in known:
                    raise LoraweaveError(f"compare.{label}.{field}: {unknown('expert', name, known)}")

    def sources(self) -> dict[str, str]:
        """Field -> file or folder."""
        found = {f"textual_inversion.{word}": place for word, place in self.textual_inversion.items()}
        found |= {kind: place for kind in ("custom_diffusion", "dreambooth") if (place := getattr(self, kind))}
        return found | {f"svdiff.{expert}": place for expert, place in self.svdiff.items()}

    def placed(self, file: Callable[[str], str]) -> Self:
        """The same with every file and folder as ``file`` says."""
        placed: dict[str, Any] = {}
        for kind in LOADED:
            match getattr(self, kind):
                case str(place):
                    placed[kind] = file(place)
                case {**places} if places:
                    placed[kind] = {name: file(str(place)) for name, place in places.items()}
        return self.model_copy(update=placed)

    def described(self) -> dict[str, Any]:
        """What tells its pictures from others: files by their content, not their place."""
        found = self.model_dump(mode="json", include={"words", "fuse"}, exclude_defaults=True)
        return found | {field: _digest(Path(zoo.local(place))) for field, place in self.sources().items()}

    def prompt(self, text: str) -> str:
        """The prompt in this contestant's words."""
        if not self.words:
            return text
        longest = sorted(self.words, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest)), lambda found: self.words[found[0]], text)

    def loading(
        self, pipe: Any, experts: Mapping[str, str | Expert], default: Mapping[str, str], call: Mapping[str, Any]
    ) -> Loading:
        """The block in which ``pipe`` paints with it; files are checked now, before the block is entered.

        Args:
            pipe: with nothing attached to it.
            experts: whose concepts are painted.
            default: see :meth:`Fusion.loading`.
            call: see :meth:`Fusion.loading`.

        Raises:
            LoraweaveError: something is missing or does not fit the pipeline.
        """
        from loraweave.integrations import rivals

        if self.fuse is not None:
            return self.fuse.loading(pipe, experts, default, call)
        if self.textual_inversion:
            return rivals.textual_inversion(pipe, self.textual_inversion)
        if self.custom_diffusion is not None:
            return rivals.custom_diffusion(pipe, self.custom_diffusion)
        if self.dreambooth is not None:
            return rivals.dreambooth(pipe, self.dreambooth)
        for name in experts:
            if name not in self.svdiff:
                raise LoraweaveError(f"svdiff: no shifts for expert {name!r}")
        return rivals.svdiff(pipe, [zoo.local(self.svdiff[name]) for name in experts])


def _digest(place: Path) -> str:
    from loraweave.experts.weightfile import hash_files

    if place.is_file():
        return hash_files([place])
    parts = ("", "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return hash_files(file for part in parts for file in sorted((place / part).glob("*.safetensors")))
