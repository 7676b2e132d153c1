"""The image pipeline, the LoRAs and the CLIP models that come with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.errors import LoraweaveError, unknown

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

_HERE = Path(__file__).parent
_WEIGHTS = _HERE / "weights"
CLIPS = ("clip-objective", "clip-metrics")
"""The CLIP that gates may be taught by, and another for scores, so that no method is scored by its own teacher."""
STEPS, GUIDANCE = 25, 3.0
"""What the card's pictures are painted with."""


def base_path() -> Path:
    """The folder of the bundled pipeline. Raises :class:`LoraweaveError` if the package was installed without it."""
    return _present(_WEIGHTS / "base")


def pipeline() -> StableDiffusionPipeline:
    """The bundled pipeline in fp32, on the CPU: pictures of 32 x 32 pixels, latents of 16 x 16 x 8."""
    from loraweave.integrations.diffusers import load_pipeline

    pipe: StableDiffusionPipeline = load_pipeline("zoo:images", "StableDiffusionPipeline")
    return pipe


def loras(names: Iterable[str] | None = None) -> dict[str, Path]:
    """The files of the bundled LoRAs by name.

    Args:
        names: which, in this order; all of them in the card's order where left out.

    Raises:
        LoraweaveError: an unknown name, or weights that are not there.
    """
    known = skills()
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise unknown("bundled image LoRA", name, known)
    return {name: _present(_WEIGHTS / "loras" / f"{name}.safetensors") for name in chosen}


def shifts(names: Iterable[str] | None = None) -> dict[str, Path]:
    """The files of bundled SVDiff shifts by name: of the same elements as the LoRAs called so, for comparisons.

    Args:
        names: which, in this order; all of them in the card's order where left out.

    Raises:
        LoraweaveError: an unknown name, or weights that are not there.
    """
    known = card()["shifts"]
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise unknown("bundled spectral shifts", name, known)
    return {name: _present(_WEIGHTS / "shifts" / f"{name}.safetensors") for name in chosen}


def clip_path(name: str) -> Path:
    """The folder of one of :data:`CLIPS`, with tokenizer and processor.

    Raises:
        LoraweaveError: there is no such one, or its weights are not there.
    """
    if name not in CLIPS:
        raise unknown("bundled CLIP", name, CLIPS)
    return _present(_WEIGHTS / name)


def place(name: str) -> Path:
    """Where the bundled thing lies that is called ``zoo:images/NAME`` in recipes: a LoRA, one of :data:`CLIPS`, or
    ``shifts/`` and the name of spectral shifts.

    Raises:
        LoraweaveError: there is none of that name.
    """
    if name in CLIPS:
        return clip_path(name)
    if name.startswith("shifts/"):
        one = name.removeprefix("shifts/")
        return shifts([one])[one]
    known = skills()
    if name not in known:
        raise unknown("bundled image LoRA or CLIP", name, [*known, *CLIPS])
    return loras([name])[name]


def skills() -> dict[str, dict[str, Any]]:
    """What the card says about each LoRA: ``words``, ``layer`` (``style`` for styles), ``scores``, ``rank``, ``alpha``,
    ``targets``, ``format``, ``seed``, ``steps``, ``seconds`` and more."""
    return {name: dict(entry) for name, entry in card()["loras"].items()}


def references() -> dict[str, Tensor]:
    """Per LoRA, how exact pictures of what it paints look to ``clip-metrics``: the mean of their unit feature vectors,
    ``[d]``, float32. A picture's mean cosine with the references is its own unit vector times this one."""
    from safetensors.torch import load_file

    return {name: vector.float() for name, vector in load_file(_present(_WEIGHTS / "references.safetensors")).items()}


def card() -> dict[str, Any]:
    """The whole of ``card.json``, as a fresh copy."""
    loaded: dict[str, Any] = json.loads(_card_text())
    return loaded


@cache
def _card_text() -> str:
    return _present(_HERE / "card.json").read_text(encoding="utf-8")


def _present(path: Path) -> Path:
    if not path.exists():
        raise LoraweaveError(
            f"the bundled {path.relative_to(_HERE)} is missing from {str(_HERE)!r}; reinstall loraweave, "
            "or make it with scripts/zoo/images"
        )
    return path
