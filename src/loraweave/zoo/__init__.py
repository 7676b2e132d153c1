"""A small model and a set of LoRAs that come with the package, and endless generated tasks for them.

The image pipeline and its LoRAs are in :mod:`loraweave.zoo.images`.

>>> from loraweave import zoo
>>> model, tokenizer = zoo.load_base()
>>> mixture = lw.attach(model, zoo.experts(), lw.MoLE())

Importing this module loads neither torch nor transformers; only :func:`load_base` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.errors import LoraweaveError, unknown
from loraweave.zoo import images, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

_HERE = Path(__file__).parent
BASE = "loraweave-zoo-t5"
"""The name that the bundled LoRAs give as their base."""
PREFIX = "zoo:"
"""What the names of bundled things begin with in recipes and on the command line."""


def base_path() -> Path:
    """The folder of the bundled model. Raises :class:`LoraweaveError` if the package was installed without it."""
    return _present(_HERE / "weights" / "base")


def experts(names: Iterable[str] | None = None) -> dict[str, Path]:
    """The PEFT folders of the bundled LoRAs by name.

    Args:
        names: which, in this order; all of them in the card's order where left out.

    Raises:
        LoraweaveError: an unknown name, or weights that are not there.
    """
    known = skills()
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise unknown("bundled LoRA", name, known)
    return {name: _present(_HERE / "weights" / "loras" / name) for name in chosen}


def place(source: str) -> Path:
    """Where something bundled lies that recipes call ``zoo`` (the model), ``zoo:NAME`` (a LoRA), ``zoo:images`` (the
    image pipeline) or ``zoo:images/NAME`` (a LoRA or CLIP for it, or ``shifts/`` and the name of spectral shifts).

    Raises:
        LoraweaveError: there is nothing of that name.
    """
    name = source.removeprefix(PREFIX)
    if source == "zoo":
        return base_path()
    if name == "images":
        return images.base_path()
    if name.startswith("images/"):
        return images.place(name.removeprefix("images/"))
    return experts([name])[name]


def is_bundled(source: str | None) -> bool:
    """Whether this is how recipes call something bundled: ``zoo`` or ``zoo:...``."""
    return source is not None and (source == "zoo" or source.startswith(PREFIX))


def local(source: str) -> str:
    """``source``, or where it lies if it is something bundled (``zoo``, ``zoo:...``); raises as :func:`place`."""
    return str(place(source)) if is_bundled(source) else source


def name_of(base: str | None) -> str | None:
    """``zoo`` or ``zoo:images`` if ``base`` is the folder of a bundled base, else ``base`` itself."""
    bundled = {_HERE / "weights" / "base": "zoo", _HERE / "images" / "weights" / "base": "zoo:images"}
    return base if base is None else bundled.get(Path(base), base)


def skills() -> dict[str, dict[str, Any]]:
    """What the card says about each LoRA: ``data``, ``metric``, ``base``, ``lora`` and ``floor`` scores (0 to 100),
    ``n_test``, ``rank``, ``alpha``, ``targets``, ``source``, ``licence``, ``seed``, ``steps``, ``seconds`` and more."""
    return {name: dict(entry) for name, entry in card()["loras"].items()}


def generated() -> dict[str, str]:
    """The LoRAs trained on generated tasks, and their tasks: name to ``family/variant``."""
    return {name: entry["data"] for name, entry in skills().items() if not entry["data"].startswith("data:")}


def card() -> dict[str, Any]:
    """The whole of ``card.json``, as a fresh copy."""
    loaded: dict[str, Any] = json.loads(_card_text())
    return loaded


def load_base() -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The bundled model in fp32, in evaluation mode, and its tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

    path = base_path()
    model = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(path)


@cache
def _card_text() -> str:
    return _present(_HERE / "card.json").read_text(encoding="utf-8")


def _present(path: Path) -> Path:
    if not path.exists():
        raise LoraweaveError(
            f"the bundled {path.relative_to(_HERE)} is missing from {str(_HERE)!r}; reinstall loraweave, "
            "or make it with scripts/zoo"
        )
    return path


__all__ = [
    "BASE",
    "PREFIX",
    "base_path",
    "card",
    "experts",
    "generated",
    "images",
    "is_bundled",
    "load_base",
    "local",
    "name_of",
    "place",
    "skills",
    "tasks",
]
