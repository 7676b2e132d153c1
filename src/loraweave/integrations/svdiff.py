"""SVDiff: experts that shift the singular values of a model's weights (https://arxiv.org/abs/2303.11305).

A file holds ``<module>.delta``, one vector of shifts a weight, as https://github.com/mkshing/svdiff-pytorch writes it
(``spectral_shifts.safetensors`` for the UNet, ``spectral_shifts_te.safetensors`` for the text encoder).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError, unknown
from loraweave.experts.filewriter import check_file
from loraweave.experts.mapped import open_tensors
from loraweave.experts.weightfile import MIXABLE_DTYPES, PICKLES, pickle_refused, read_header
from loraweave.files import atomic_path

_SUFFIX = ".delta"
Shifts = Mapping[str, Tensor]
"""Path of a module in its model -> shifts of its singular values, largest value first."""


def read_shifts(path: str | Path) -> dict[str, Tensor]:
    """The shifts in a safetensors file, by module.

    Raises:
        LoraweaveError: the file is missing, a pickle or damaged, or a tensor is no finite vector of shifts.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise pickle_refused(path)
    header = read_header(path)
    if not header.tensors:
        raise LoraweaveError(f"{path}: expected tensors named '<module>{_SUFFIX}', got none; is it an SVDiff file?")
    shifts = {}
    read = open_tensors(header)
    for key, info in header.tensors.items():
        if not key.endswith(_SUFFIX) or len(info.shape) != 1 or info.dtype not in MIXABLE_DTYPES:
            raise LoraweaveError(
                f"{path}: tensor {key[:120]!r} is {info.dtype} {list(info.shape)}, expected '<module>{_SUFFIX}', a "
                f"vector of {', '.join(MIXABLE_DTYPES)}; is it an SVDiff file?"
            )
        value = read(key).clone()
        if not value.isfinite().all():
            raise LoraweaveError(f"{path}: tensor {key[:120]!r} expected finite numbers, got NaN or infinity")
        shifts[key.removesuffix(_SUFFIX)] = value
    return shifts


def write_shifts(shifts: Shifts, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write shifts as one safetensors file that :func:`read_shifts` and svdiff-pytorch read.

    Raises:
        LoraweaveError: there are none, the file exists (unless ``overwrite``) or is no ``.safetensors``, or it cannot
            be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not shifts:
        raise LoraweaveError(f"{path}: there are no shifts to write")
    path = check_file(path, overwrite)
    tensors = {f"{name}{_SUFFIX}": delta.detach().float().cpu().contiguous().clone() for name, delta in shifts.items()}
    try:
        with atomic_path(path) as place:
            save_file(tensors, str(place), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise LoraweaveError(f"{path}: cannot be written ({error})") from error
    return path


def compose_shifts(experts: Sequence[Shifts], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """``sum_i w_i delta_i`` in float64, module by module; a module that an expert lacks counts as zero there.

    Args:
        experts: of the same base model.
        weights: one an expert; default: 1 each, the paper's sum. ``1 / N`` each gives the average.

    Raises:
        LoraweaveError: weights and experts differ in number, or two experts in the length of a module's shifts.
    """
    weights = [1.0] * len(experts) if weights is None else weights
    if len(weights) != len(experts):
        raise LoraweaveError(f"weights: expected {len(experts)}, one an expert, got {len(weights)}")
    total: dict[str, Tensor] = {}
    for expert, weight in zip(experts, weights, strict=True):
        for name, delta in expert.items():
            term = weight * delta.double()
            if name in total and total[name].shape != term.shape:
                raise LoraweaveError(
                    f"{name}: expected {len(total[name])} shifts as in the experts before, got {len(term)}; "
                    "compose experts of one base model"
                )
            total[name] = total[name] + term if name in total else term
    return total


def shifted(weight: Tensor, delta: Tensor) -> Tensor:
    """``U diag(relu(sigma + delta)) V^T``, computed in float64, in the weight's shape and dtype.

    Args:
        weight: ``[out, in]``, a convolution's ``[out, in, k, k]`` (taken as ``[out, in*k*k]``), or a norm's ``[n]``
            (taken as ``[1, n]``).
        delta: ``[min(out, in*k*k)]``.
    """
    U, sigma, Vh = torch.linalg.svd(as_matrix(weight).double(), full_matrices=False)
    moved = torch.relu(sigma + delta.to(sigma))
    result: Tensor = ((U * moved) @ Vh).reshape(weight.shape).to(weight.dtype)
    return result


@contextmanager
def apply_shifts(model: nn.Module, shifts: Shifts) -> Iterator[None]:
    """Within the block the model has shifted weights; afterwards its own, bit for bit.

    A module whose shifts are all zero keeps its weight untouched.

    Args:
        model: e.g. ``pipeline.unet``.
        shifts: of one expert, or composed.

    Raises:
        LoraweaveError: a module is unknown or has no weight, or its weight has another number of singular values;
            nothing has been changed then.
    """
    found = shifted_weights(model, shifts)
    saved = {name: weight.detach().clone() for name, weight in found.items()}
    try:
        with torch.no_grad():
            for name, weight in found.items():
                weight.copy_(shifted(saved[name], shifts[name]))
        yield
    finally:
        with torch.no_grad():
            for name, weight in found.items():
                weight.copy_(saved[name])


def shifted_weights(model: nn.Module, shifts: Shifts) -> dict[str, nn.Parameter]:
    """Module -> the weight that its shifts change; without those whose shifts are all zero.

    Raises:
        LoraweaveError: as :func:`apply_shifts`.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Parameter] = {}
    for name, delta in shifts.items():
        if name not in modules:
            raise unknown("module", name, modules)
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise LoraweaveError(f"{name}: expected a module with a weight, got {type(modules[name]).__name__}")
        count = min(as_matrix(weight).shape)
        if delta.shape != (count,):
            raise LoraweaveError(f"{name}: expected {count} shifts, got {list(delta.shape)}; is it for another base?")
        if delta.any():
            found[name] = weight
    return found


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as the matrix that is decomposed: see :func:`shifted`."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)
