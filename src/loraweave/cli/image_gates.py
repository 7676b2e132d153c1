"""The part of ``loraweave train`` that teaches gates over a diffusers pipeline."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from loraweave import persistence
from loraweave.errors import LoraweaveError
from loraweave.integrations.diffusers import load_pipeline
from loraweave.mixture import attach
from loraweave.recipe import Recipe
from loraweave.recipe.images import Images
from loraweave.training.images.checkpoints import whole
from loraweave.training.images.pictures import files_of
from loraweave.training.images.train import train_images
from loraweave.training.learn import learns


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
    # Before the base is loaded, so that bad folders show at once.
    for folder in (*images.references.values(), *images.pictures.values()):
        files_of(Path(folder))
    kept = Path(f"{Path(out)}.unfinished" if checkpoints is None else checkpoints)
    data, objective = images.lesson()
    # A saved mixture remembers where its base is, and may be loaded from elsewhere.
    base = str(Path(recipe.base).resolve()) if Path(recipe.base).is_dir() else recipe.base
    mixture = attach(load_pipeline(base, "DiffusionPipeline"), recipe.sources(), recipe.method.policy())
    if learns(mixture):
        options: dict[str, Any] = recipe.train.options()
        if options.pop("bf16", False):
            options["mixed_precision"] = "bf16"
        place: dict[str, Any] = {"output_dir": kept, "resume": True, "sample_every": images.sample_every}
        try:
            result = train_images(mixture, data, objective, **place, **options, progress=sys.stderr.isatty())
        except KeyboardInterrupt:
            done = whole(kept)
            if done:
                print(f"kept step {done[-1][0]} in {kept}; the same command goes on from there", file=sys.stderr)
            raise
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


def _first() -> bool:
    """Whether this is the first of the processes that train together."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
