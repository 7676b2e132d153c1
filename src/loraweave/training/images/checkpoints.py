"""Checkpoints of image gates: whole or not there at all, and read without unpickling."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave import persistence
from loraweave.errors import LoraweaveError
from loraweave.files import replace_folder_atomic
from loraweave.integrations.clip import Clip
from loraweave.mixture import Mixture
from loraweave.policies import registry

STATE, KEPT = "state.pt", 2
_OURS = [persistence.MIXTURE, persistence.GATES, persistence.CARD, STATE]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        history: the log.
        total: sum of the losses of all steps.
        settings: of the run, which a run that goes on must share.
        seconds: wall-clock time up to here, of all calls.
    """

    step: int
    history: list[dict[str, float]]
    total: float
    settings: dict[str, Any]
    seconds: float = 0.0


def write(folder: Path, mixture: Mixture, state: dict[str, Any], progress: Progress) -> Path:
    """Write ``checkpoint-STEP``; of older ones the newest is kept.

    Args:
        folder: where checkpoints go.
        mixture: whose gates are saved.
        state: state dicts of optimiser, schedule and scaler.
        progress: how far the run is.
    """
    target = folder / f"checkpoint-{progress.step}"
    with replace_folder_atomic(target, ours=_OURS) as out:
        persistence.save(mixture, out, into=True)
        torch.save(state | {"progress": vars(progress)}, out / STATE)
    for _, old in whole(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def whole(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of all checkpoints, the newest last. They appear by a rename, so each is whole."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / STATE).is_file()
    ]
    return sorted(found)


def read(folder: Path, mixture: Mixture, settings: dict[str, Any]) -> tuple[dict[str, Any], Progress] | None:
    """Put the newest checkpoint's gates into the mixture; its other state and progress, ``None`` if there is none.

    Raises:
        LoraweaveError: it is damaged, is of another mixture, or its run had other settings.
    """
    found = whole(folder)
    if not found:
        return None
    place = found[-1][1]
    try:
        state: dict[str, Any] = torch.load(place / STATE, weights_only=True, map_location="cpu")
        progress = Progress(**state.pop("progress"))
    except Exception as error:
        raise LoraweaveError(f"{place / STATE}: damaged ({str(error)[:80]}); remove this checkpoint") from error
    for name in dict.fromkeys([*settings, *(progress.settings if settings else ())]):
        before, now = (_shown(had, name) for had in (progress.settings, settings))
        if before != now:
            raise LoraweaveError(
                f"{place}: this run had {name}={before}, got {now}; go on with the same, or remove the folder or name "
                "another"
            )
    persistence.load_gates(mixture, place)
    return state, progress


def attached(mixture: Mixture) -> dict[str, Any]:
    """Policy and experts as plain values that a checkpoint can hold; files of experts are told by their hash."""
    experts = {expert.name: expert.sha256[:12] for expert in mixture.sources}
    return _entries("policy", registry.to_dict(mixture.policy)) | _entries("experts", experts)


def described(objective: Any) -> dict[str, Any]:
    """An objective's kind and options as plain values that a checkpoint can hold, ``objective.OPTION`` -> value.

    Mappings are told entry by entry. Pictures and models are told by a hash, folders by their names.
    """
    told: dict[str, Any] = {"objective": type(objective).__name__}
    for one in dataclasses.fields(objective):
        told |= _entries(f"objective.{one.name}", getattr(objective, one.name))
    return told


def _entries(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: _plain(value)}
    return {key: plain for entry, inner in value.items() for key, plain in _entries(f"{name}.{entry}", inner).items()}


def _plain(value: Any) -> Any:
    for kind in (bool, int, float, str):  # numpy's own numbers are some of these, too
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Clip):
        ends = [value.model.text_projection.weight, value.model.visual_projection.weight]
        return f"CLIP {_hash(b''.join(map(_bytes, ends)))}"
    if isinstance(value, Tensor):
        return f"tensor {_hash(_bytes(value))}"
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {_hash(value.tobytes())}"
    return None if value is None else type(value).__name__


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().double().numpy().tobytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "nothing"
