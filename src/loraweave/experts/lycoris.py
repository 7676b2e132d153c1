"""LoHa and LoKr (LyCORIS files): their updates are products of small matrices, so each is a LoRA, exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t[12])$")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
WIDEST, LARGEST = 2**17, 2**31
"""Beyond them a small file would ask for absurd matrices: inputs or outputs of a module, numbers in all."""


@dataclass(frozen=True)
class Lycoris:
    """One module of a LoHa or LoKr.

    Attributes:
        keys: part (``hada_w1_a`` ...) -> name of its tensor in the file.
        shapes: part -> its shape, of LoKr's second factor with the kernel flattened.
        inputs, outputs: of the update as a matrix; of a convolution ``inputs`` counts the kernel.
        rank: of the LoRA it is; at most the smaller side.
        divisor: what alpha is divided by; ``None`` where LyCORIS scales by nothing.
    """

    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    inputs: int
    outputs: int
    rank: int
    divisor: int | None

    def scale(self, alpha: float | None) -> float:
        """``alpha / rank`` with the rank that the file's author chose."""
        return 1.0 if alpha is None or self.divisor is None else alpha / self.divisor

    def factors(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """``A`` ``[rank, inputs]`` and ``B`` ``[outputs, rank]``, in single precision.

        LoHa (Hyeon-Woo et al. 2022): ``(w1_a w1_b) * (w2_a w2_b)``, entry by entry. With ``c`` running over all pairs
        ``(i, j)``: ``B[o, c] = w1_a[o, i] w2_a[o, j]``, ``A[c, n] = w1_b[i, n] w2_b[j, n]``. LoKr (LyCORIS, Yeh et al.
        2024): ``kron(w1, w2)``, and ``kron(P Q, R S) = kron(P, R) kron(Q, S)``.
        """
        part = {name: get(key).float().reshape(self.shapes[name]) for name, key in self.keys.items()}
        if "hada_w1_a" in part:
            up1, down1, up2, down2 = (part[name] for name in _LOHA)
            B = (up1[:, :, None] * up2[:, None, :]).flatten(1)
            A = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        else:
            (up1, down1), (up2, down2) = (_split(part, f"lokr_w{number}") for number in (1, 2))
            B, A = torch.kron(up1, up2), torch.kron(down1, down2)
        if len(A) == self.rank:
            return A, B
        update = B @ A
        eye = torch.eye(self.rank)
        return (eye, update) if self.inputs == self.rank else (update, eye)


def _split(part: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A matrix as a product of two, one of which is the identity if it is stored whole."""
    if name not in part:
        return part[f"{name}_a"], part[f"{name}_b"]
    whole = part[name]
    rows, columns = whole.shape
    return (whole, torch.eye(columns)) if columns <= rows else (torch.eye(rows), whole)


def modules(shapes: Mapping[str, Iterable[int]]) -> dict[str, Lycoris]:
    """The LoHa and LoKr modules of a file.

    Args:
        shapes: name of each tensor -> its shape.

    Raises:
        LoraweaveError: parts are missing or do not fit one another, a third factor (Tucker) is there, or what they
            make is larger than any model.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in shapes:
        if match := _PART.match(key):
            parts.setdefault(match["module"], {})[match["part"]] = key
    found = {module: _module(module, keys, shapes) for module, keys in parts.items()}
    if sum(one.rank * (one.inputs + one.outputs) for one in found.values()) > LARGEST:
        raise LoraweaveError("as a plain LoRA it would be larger than 8 GB")
    return found


def _module(module: str, keys: Mapping[str, str], shapes: Mapping[str, Iterable[int]]) -> Lycoris:
    if any(part.startswith(("hada_t", "lokr_t")) for part in keys):
        raise LoraweaveError(f"{module!r} has a third factor (Tucker), so it is no plain LoRA; convert it with LyCORIS")
    flat = {part: _flat(shapes[key]) for part, key in keys.items()}
    divisor: int | None
    if any(part.startswith("hada_") for part in keys):
        if flat.keys() != set(_LOHA):
            raise LoraweaveError(f"{module!r} has {', '.join(sorted(keys))}; expected {', '.join(_LOHA)}")
        first, second = (_product(module, flat, f"hada_w{number}") for number in (1, 2))
        if first[:2] != second[:2]:
            raise LoraweaveError(f"{module!r}: its two products have shapes {first[:2]} and {second[:2]}")
        outputs, inputs = first[:2]
        rank, divisor = first[2] * second[2], flat["hada_w1_b"][0]
    else:
        first, second = (_product(module, flat, f"lokr_w{number}") for number in (1, 2))
        outputs, inputs, rank = first[0] * second[0], first[1] * second[1], first[2] * second[2]
        factored = [flat[part][0] for part in ("lokr_w2_b", "lokr_w1_b") if part in flat]
        divisor = factored[0] if factored else None
    if not rank or max(outputs, inputs) > WIDEST or rank > WIDEST:
        raise LoraweaveError(f"{module!r} makes a matrix of {outputs} x {inputs}, which no model has")
    return Lycoris(dict(keys), flat, inputs, outputs, min(rank, outputs, inputs), divisor)


def _flat(shape: Iterable[int]) -> tuple[int, int]:
    """A shape as a matrix's; of a convolution the kernel belongs to the columns."""
    rows, *rest = (*shape,) or (0,)
    return rows, math.prod(rest) if rest else 0


def _product(module: str, flat: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int, int]:
    """Rows, columns and inner width of a matrix that is stored whole or as a product."""
    if name in flat:
        return *flat[name], min(flat[name])
    a, b = flat.get(f"{name}_a"), flat.get(f"{name}_b")
    if a is None or b is None or a[1] != b[0]:
        raise LoraweaveError(f"{module!r}: {name} is there neither whole nor as two factors that fit ({a} and {b})")
    return a[0], b[1], a[1]
