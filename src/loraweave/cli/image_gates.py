"""The part of ``loraweave train`` that teaches gates over a diffusers pipeline; ``loraweave testbed`` shares it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from loraweave import persistence
from loraweave.errors import LoraweaveError
from loraweave.integrations.diffusers import load_pipeline
from loraweave.mixture import Mixture, attach
from loraweave.recipe import Recipe, Train
from loraweave.recipe.images import Images
from loraweave.training.images.checkpoints import whole
from loraweave.training.images.pictures import files_of
from loraweave.training.images.train import train_images
from loraweave.training.learn import learns
from loraweave.training.train import TrainingResult

# A kill, unlike Ctrl-C, writes no checkpoint: so many steps may be lost.
_SAVE_EVERY = 20


def teach(recipe: Recipe, images: Images, out: str, *, copy_experts: bool, checkpoints: str | None) -> None:
    """Train the recipe's gates as its section ``images`` says, and save the mixture.

    Args:
        recipe: whose base is a pipeline.
        images: its section.
        out: where the mixture is saved, by the first process alone.
        copy_experts: save the experts too.
        checkpoints: folder of checkpoints, from which a run goes on, and of sample pictures. Without one, checkpoints
            stand beside ``out`` until the mixture is saved, so that an interruption loses nothing.

    Raises:
        LoraweaveError: something cannot be read, or sample pictures have no folder.
    """
    if images.sample_every is not None and checkpoints is None:
        raise LoraweaveError("images.sample_every: samples go beside checkpoints; give --checkpoints DIR")
    check_folders(images)
    kept = unfinished(Path(out)) if checkpoints is None else Path(checkpoints)
    mixture = attach(open_base(recipe), recipe.sources(), recipe.method.policy())
    if learns(mixture):
        result = learn_gates(mixture, images, recipe.train, kept, progress=sys.stderr.isatty())
        said = f"{result.steps} steps in {result.seconds:.0f} s, mean loss {result.loss:.3f}"
    else:
        said = f"{recipe.method.name!r} has nothing to train"
    if not _first():
        return
    print(said)
    saved = persistence.save(mixture, out, copy_experts=copy_experts or bool(recipe.merged), recipe=recipe.to_dict())
    if checkpoints is None and kept.is_dir():
        shutil.rmtree(kept)
    print(f"saved to {saved}; try: loraweave image RECIPE --method {saved} --prompt TEXT -o DIR")


def check_folders(images: Images) -> None:
    """Raise :class:`LoraweaveError` where a folder of pictures is missing or empty, before the base is loaded."""
    for folder in (*images.references.values(), *images.pictures.values()):
        files_of(Path(folder))


def unfinished(out: Path) -> Path:
    """Where checkpoints stand until the mixture is saved to ``out``."""
    return Path(f"{out}.unfinished")


def open_base(recipe: Recipe) -> Any:
    """The recipe's pipeline, in single precision; a saved mixture remembers where it is, and may be loaded from
    elsewhere."""
    base = str(Path(recipe.base).resolve()) if Path(recipe.base).is_dir() else recipe.base
    return load_pipeline(base, "DiffusionPipeline")


def learn_gates(mixture: Mixture, images: Images, train: Train, kept: Path, *, progress: bool | str) -> TrainingResult:
    """Train the gates as ``images`` and ``train`` say, from the last checkpoint in ``kept`` if there is one."""
    data, objective = images.lesson()
    options: dict[str, Any] = train.options()
    if options.pop("bf16", False):
        options["mixed_precision"] = "bf16"
    place: dict[str, Any] = {"output_dir": kept, "resume": True, "save_every": _SAVE_EVERY}
    place["sample_every"] = images.sample_every
    try:
        return train_images(mixture, data, objective, **place, **options, progress=progress)
    except KeyboardInterrupt:
        if done := whole(kept):
            print(f"kept step {done[-1][0]} in {kept}; the same command goes on from there", file=sys.stderr)
        raise


def _first() -> bool:
    """Whether this is the first of the processes that train together."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
