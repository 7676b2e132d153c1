"""The work of ``loraweave image``."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraweave import persistence
from loraweave.errors import LoraweaveError, LoraweaveWarning, unknown
from loraweave.evaluation.environment import environment
from loraweave.experts.triggers import warn_of_triggers
from loraweave.experts.types import Expert
from loraweave.files import atomic_path, write_json_atomic
from loraweave.integrations.rivals import Loading
from loraweave.mixture import Mixture, attach
from loraweave.policies import Composite, Sum, Switch, registry
from loraweave.recipe import Method, Recipe
from loraweave.recipe_rivals import Rival
from loraweave.recipe_testbed import Testbed
from loraweave.reporting.sheets import contact_sheet
from loraweave.training.learn import learns

BARE = "bare"
_FILE, _SHEET = "image.json", "sheet.png"


def paint(recipe: Recipe, options: argparse.Namespace) -> None:
    """Every method and seed: a picture each, then the sheet and the JSON."""
    from loraweave.integrations.diffusers import load_pipeline

    methods = chosen(recipe, options.method)
    out = Path(options.out)
    pipe = load_pipeline(recipe.base, "DiffusionPipeline")
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    # What does not fit shows now, not after the painting before it.
    loadings = {
        label: loading(label, way.rival, pipe, recipe.experts, recipe.testbed, call_of(options))
        for label, way in methods.items()
        if way.rival is not None
    }
    mixture = attach(pipe, recipe.experts, Sum())
    warn_of_triggers(mixture.sources, [options.prompt])
    for label, way in methods.items():
        print(f"{label}: {cost(way, len(mixture.experts))}", flush=True)
    for label, block in loadings.items():
        block.warn_of_tokens(label, [methods[label].prompt(options.prompt)])
    pictures: dict[tuple[str, int], Any] = {}
    entries = []

    def take(label: str) -> None:
        for seed in options.seed:
            began = time.perf_counter()
            picture = one(pipe, options, seed, methods[label].prompt(options.prompt))
            seconds = time.perf_counter() - began
            name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}-{seed}.png"
            pictures[label, seed] = picture
            with atomic_path(out / name) as path:
                picture.save(path, format="PNG")
            entries.append({"method": label, "seed": seed, "file": name, "seconds": round(seconds, 3)})
            print(f"{out / name}: {seconds:.1f} s", flush=True)

    for label, way in methods.items():
        if way.rival is not None:
            continue
        if way.saved is None:
            mixture.policy = Sum(0.0) if way.policy is None else way.policy
            if learns(mixture):
                warnings.warn(
                    f"{label}: nothing was learned, these are fresh gates or weights; give --method the folder of a "
                    "mixture that 'loraweave train' saved",
                    LoraweaveWarning,
                    stacklevel=2,
                )
        else:
            persistence.adopt(mixture, way.saved)
        take(label)
    mixture.detach()
    for label, block in loadings.items():
        with block:
            take(label)
    entries.sort(key=lambda entry: list(methods).index(entry["method"]))
    with atomic_path(out / _SHEET) as path:
        rows = [[pictures[label, seed] for label in methods] for seed in options.seed]
        contact_sheet(rows, list(methods), [f"#{seed}" for seed in options.seed]).save(path, format="PNG")
    write_json_atomic(out / _FILE, described(recipe, options, mixture, methods) | {"pictures": entries})
    print(out / _SHEET)


class Way(NamedTuple):
    """How to paint.

    Attributes:
        policy: the method, ``None`` for the bare base.
        saved: the mixture whose method and gates these are.
        rival: what is no mixture.
    """

    policy: Any
    saved: Path | None = None
    rival: Rival | None = None

    def prompt(self, text: str) -> str:
        """The prompt in the words that this one reads."""
        return text if self.rival is None else self.rival.prompt(text)


def contestants(recipe: Recipe) -> dict[str, Way]:
    """Label -> method or saved mixture of the recipe's ``compare``.

    Raises:
        LoraweaveError: a folder holds no saved mixture.
    """
    found = {}
    for label, contender in recipe.compare.items():
        if contender.kind is not None:
            found[label] = Way(None, rival=contender)
            continue
        if contender.saved is None:
            found[label] = Way(contender.method.policy())
            continue
        place = Path(contender.saved)
        try:
            found[label] = Way(persistence.saved_policy(place), place)
        except LoraweaveError as error:
            raise LoraweaveError(f"compare.{label}.saved: {error}") from error
    return found


def chosen(recipe: Recipe, names: list[str]) -> dict[str, Way]:
    """Label -> method; a saved mixture is called like its folder.

    Raises:
        LoraweaveError: a name is neither a label of the recipe, a method nor a saved mixture, or is given twice.
    """
    labels = contestants(recipe)
    if not names:
        return labels or {recipe.method.name: Way(recipe.method.policy())}
    if len(set(names)) < len(names):
        raise LoraweaveError(
            "argument --method: a method is named twice; labels in the recipe's 'compare' tell them apart"
        )
    known = [*labels, *registry.names(), *registry.ALIASES, BARE]
    found: dict[str, Way] = {}
    for name in names:
        place = Path(name)
        if name not in known and place.is_dir():
            label = place.resolve().name
            if label in found or (label != name and label in names):
                raise LoraweaveError(f"argument --method: two are called {label!r}; rename the folder {name!r}")
            found[label] = Way(persistence.saved_policy(place), place)
        elif name not in known:
            raise unknown("method", name, known)
        elif name == BARE:
            found[name] = Way(None)
        else:
            own = recipe.method if recipe.method.name == name else Method(name=name)
            found[name] = labels.get(name) or Way(own.policy())
    return found


def cost(way: Way, experts: int) -> str:
    """What a step costs, in words."""
    if way.rival is not None and way.rival.fuse is not None:
        return f"as one LoRA, once {experts} are fused, which paints every prompt of each"
    method = way.policy
    if method is None and way.rival is not None:
        return "as the bare base"
    if method is None:
        return "the bare base"
    if isinstance(method, Composite):
        chunk = method.chunk or experts
        return f"the denoiser on {experts} times the rows, {min(chunk, experts)} times at once"
    return (
        "as one LoRA" if isinstance(method, Switch) else f"as {experts} LoRAs side by side: the base and a little more"
    )


def one(pipe: Any, options: argparse.Namespace, seed: int, prompt: str) -> Any:
    """One picture."""
    call = {"prompt": prompt, "num_inference_steps": options.steps, **call_of(options)}
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0]


def call_of(options: argparse.Namespace | Testbed) -> dict[str, Any]:
    """What every call of the pipeline is given, as far as it is set."""
    call: dict[str, Any] = {}
    if options.negative is not None:
        call["negative_prompt"] = options.negative
    if options.guidance is not None:
        call["guidance_scale"] = options.guidance
    if options.size is not None:
        call["width"], call["height"] = options.size
    return call


def loading(
    label: str,
    rival: Rival,
    pipe: Any,
    experts: Mapping[str, str | Expert],
    testbed: Testbed | None,
    call: Mapping[str, Any],
) -> Loading:
    """:meth:`Rival.loading`, with the test bed's trigger words as default prompts.

    Raises:
        LoraweaveError: something does not fit the pipeline; the message names the contestant.
    """
    elements = {} if testbed is None else testbed.elements
    said = {name: ", ".join(element.triggers) for name, element in elements.items()}
    try:
        return rival.loading(pipe, experts, said, call)
    except LoraweaveError as error:
        raise LoraweaveError(f"compare.{label}: {error}") from error


def described(recipe: Recipe, options: argparse.Namespace, mixture: Mixture, methods: dict[str, Way]) -> dict[str, Any]:
    """Everything that is needed to paint the same again."""
    import diffusers

    found = environment()
    found["versions"]["diffusers"] = diffusers.__version__
    return {
        "base": recipe.base,
        "pipeline": type(mixture.pipeline).__name__,
        "scheduler": type(mixture.pipeline.scheduler).__name__,
        "experts": [{"name": e.name, "source": e.source, "sha256": e.sha256} for e in mixture.sources],
        "prompt": options.prompt,
        "negative": options.negative,
        "steps": options.steps,
        "guidance": options.guidance,
        "size": options.size,
        "methods": {label: _described(way) for label, way in methods.items()},
        **found,
    }


def _described(way: Way) -> dict[str, Any] | None:
    if way.rival is not None:
        return way.rival.model_dump(mode="json", exclude_unset=True)
    if way.policy is None:
        return None
    return registry.to_dict(way.policy) | ({} if way.saved is None else {"saved": str(way.saved)})
