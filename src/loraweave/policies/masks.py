"""Masks: where in the picture an expert is at work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraweave.errors import LoraweaveError


@dataclass(frozen=True, eq=False)
class Mask:
    """A box in fractions of width and height, or values on a grid of their own; exactly one is given.

    Attributes:
        box: ``(x0, y0, x1, y1)``.
        values: ``[height, width]``, 0 to 1.
    """

    box: tuple[float, float, float, float] | None = None
    values: Tensor | None = None

    @property
    def peak(self) -> float:
        """The largest value."""
        return 1.0 if self.values is None else float(self.values.max())

    def draw(self, height: int, width: int) -> Tensor:
        """``[height, width]``: of each cell, the mean of the mask over its area."""
        if self.values is not None:
            return F.interpolate(self.values[None, None], size=(height, width), mode="area")[0, 0]
        assert self.box is not None
        x0, y0, x1, y1 = self.box
        return _covered(y0, y1, height).unsqueeze(1) * _covered(x0, x1, width)


def _covered(start: float, stop: float, cells: int) -> Tensor:
    """``[cells]``: how much of each cell of a unit line lies between ``start`` and ``stop``."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    inside = edges.clamp(start, stop)
    return ((inside[1:] - inside[:-1]) * cells).float()


def read(what: str, given: Any) -> Mask:
    """A mask from what a user may give; see :class:`~loraweave.policies.regional.Regional`.

    Raises:
        LoraweaveError: it is none of these, or its values leave 0..1, or it is empty.
    """
    if given is None:
        return Mask(box=(0.0, 0.0, 1.0, 1.0))
    if isinstance(given, tuple | list) and len(given) == 4 and all(isinstance(v, int | float) for v in given):
        x0, y0, x1, y1 = map(float, given)
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise LoraweaveError(
                f"{what}: expected a box (x0, y0, x1, y1) in fractions of the picture, 0 <= x0 < x1 <= 1 and "
                f"0 <= y0 < y1 <= 1, got {tuple(given)}"
            )
        return Mask(box=(x0, y0, x1, y1))
    values = _values(what, given)
    if values.ndim != 2 or 0 in values.shape:
        raise LoraweaveError(f"{what}: expected a shape [height, width], got {list(values.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = float(values.min()), float(values.max())
        raise LoraweaveError(f"{what}: expected values between 0 and 1, got {low:g} to {high:g}")
    if not bool(values.any()):
        raise LoraweaveError(f"{what}: is empty; leave the expert out, or mask it with mixture.without(...)")
    return Mask(values=values)


def _values(what: str, given: Any) -> Tensor:
    import numpy as np

    if isinstance(given, str | Path):
        given = _picture(what, Path(given))
    if hasattr(given, "convert"):  # a PIL image
        return torch.from_numpy(np.asarray(given.convert("L"), dtype=np.float32) / 255)
    try:
        values = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
        return values.detach().cpu().float() / (255 if values.dtype == torch.uint8 and values.max() > 1 else 1)
    except (TypeError, ValueError) as error:
        raise LoraweaveError(
            f"{what}: expected a box (x0, y0, x1, y1), an array [height, width], a picture, its path, or None, got "
            f"{type(given).__name__}"
        ) from error


def _picture(what: str, path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("L")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise LoraweaveError(f"{what}: {path} cannot be read as a picture ({error})") from error
