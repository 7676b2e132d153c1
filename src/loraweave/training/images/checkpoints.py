"""Checkpoints of image gates: whole or not there at all, and read without unpickling."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraweave import persistence
from loraweave.errors import LoraweaveError
from loraweave.files import replace_folder_atomic
from loraweave.mixture import Mixture

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
    """

    step: int
    history: list[dict[str, float]]
    total: float
    settings: dict[str, Any]


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
    for name, value in settings.items():
        before = progress.settings.get(name)
        if before != value:
            raise LoraweaveError(
                f"{place}: this run had {name}={before!r}, got {value!r}; go on with the same, or remove "
                "the folder or name another"
            )
    persistence.load_gates(mixture, place)
    return state, progress
