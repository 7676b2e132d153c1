"""Pictures from folders and lists, as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SMALLEST = 8
Picture: TypeAlias = Any
PictureSource: TypeAlias = str | os.PathLike[str] | Iterable[tuple[Picture, str]] | Mapping[str, str | os.PathLike[str]]


@dataclass(frozen=True)
class Captioned:
    """A picture, ``[3, height, width]`` between 0 and 1, and what is to be seen on it."""

    pixels: Tensor
    prompt: str


def read_pictures(source: PictureSource, size: tuple[int, int] | None = None) -> list[Captioned]:
    """Pictures with their prompts.

    Args:
        source: pairs of a picture (path, PIL or array ``[height, width, 3]`` of 0..255) and a prompt, or prompt ->
            folder: the caption of ``a.png`` is ``a.txt`` beside it, and the prompt where there is none.
        size: height and width; pictures are scaled to cover it and cut around their middle. Default: the first's own.

    Raises:
        LoraweaveError: there are no pictures, a file is none, or a prompt is blank.
    """
    if isinstance(source, Mapping):
        pairs = [pair for prompt, folder in source.items() for pair in _of_folder(Path(folder), prompt)]
    elif isinstance(source, str | os.PathLike):
        raise LoraweaveError(f"pictures: expected {{prompt: folder}} or pairs of picture and prompt, got {source!r}")
    elif not isinstance(source, Iterable):
        raise LoraweaveError(
            f"pictures: expected {{prompt: folder}} or pairs of picture and prompt, got {type(source).__name__}"
        )
    else:
        pairs = list(source)
    if not pairs:
        raise LoraweaveError("pictures: got none; expected {prompt: folder} or pairs of picture and prompt")
    made = []
    for n, pair in enumerate(pairs, start=1):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
            raise LoraweaveError(f"pictures: number {n}: expected a pair of picture and prompt, got {str(pair)[:60]}")
        image = open_picture(pair[0], f"pictures: number {n}")
        if size is None and min(image.size) < SMALLEST:
            raise LoraweaveError(
                f"pictures: number {n} has {image.width} x {image.height} pixels, at least {SMALLEST} x {SMALLEST} "
                "expected; give larger ones, or the size"
            )
        size = size or (image.height // 8 * 8, image.width // 8 * 8)
        made.append(Captioned(pixels(image, size), pair[1]))
    return made


def open_picture(picture: Picture, where: str) -> Any:
    """A PIL picture in RGB.

    Raises:
        LoraweaveError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        if isinstance(picture, str | os.PathLike):
            with Image.open(picture) as image:
                return image.convert("RGB")
        return Image.fromarray(picture).convert("RGB")
    except (OSError, UnidentifiedImageError, AttributeError, TypeError, ValueError) as error:
        raise LoraweaveError(f"{where}: cannot be read as a picture ({str(error)[:80]})") from error


def pixels(image: Any, size: tuple[int, int]) -> Tensor:
    """``[3, height, width]`` between 0 and 1: scaled to cover ``size``, then cut around the middle."""
    import numpy as np
    from PIL import ImageOps

    height, width = size
    if (image.height, image.width) != size:
        image = ImageOps.fit(image, (width, height))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def files_of(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name.

    Raises:
        LoraweaveError: no such folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise LoraweaveError(f"pictures: no such folder {str(folder)!r}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise LoraweaveError(f"pictures: the folder {str(folder)!r} holds none; expected {', '.join(SUFFIXES)}")
    return found


def _of_folder(folder: Path, prompt: str) -> list[tuple[Path, str]]:
    captioned = []
    for path in files_of(folder):
        beside = path.with_suffix(".txt")
        caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
        captioned.append((path, caption or prompt))
    return captioned
