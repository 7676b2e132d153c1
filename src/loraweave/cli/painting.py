"""The work of ``loraweave image``."""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraweave import persistence
from loraweave.errors import LoraweaveError, LoraweaveWarning, TriggerWarning, unknown
from loraweave.evaluation.environment import environment
from loraweave.experts.triggers import warn_of_triggers
from loraweave.experts.types import Expert
from loraweave.files import atomic_path, make_folder, write_json_atomic
from loraweave.integrations.rivals import Loading
from loraweave.mixture import Mixture, attach
from loraweave.policies import Composite, Sum, Switch, registry
from loraweave.recipe import Recipe
from loraweave.recipe.rivals import Rival
from loraweave.recipe.testbeds import Testbed
from loraweave.reporting.sheets import contact_sheet
from loraweave.training.learn import learns

BARE = "bare"
_FILE, _SHEET = "image.json", "sheet.png"


def paint(recipe: Recipe, options: argparse.Namespace) -> None:
    """Every method and seed: a picture each, then the sheet and the JSON."""
    from loraweave.integrations.diffusers import load_pipeline

    methods = chosen(recipe, options.method)
    if len(set(options.seed)) < len(options.seed):
        raise LoraweaveError("argument --seed: a seed is given twice; each makes one picture")
    for name, source in recipe.experts.items():  # before gigabytes of base are loaded
        if source.endswith(".safetensors") and not Path(source).exists():
            raise LoraweaveError(f"experts.{name}: {source}: no such file")
    out = make_folder(options.out)
    pipe = load_pipeline(recipe.base, "DiffusionPipeline")
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    sources = recipe.sources()
    # What does not fit shows now, not after the painting before it.
    loadings = {
        label: loading(label, way.rival, pipe, sources, recipe.testbed, call_of(options))
        for label, way in methods.items()
        if way.rival is not None
    }
    mixture = attach(pipe, sources, Sum())
    warn_of_triggers(mixture.sources, [options.prompt])
    for label, way in methods.items():
        print(f"{label}: {cost(way, len(mixture.experts))}", flush=True)
    for label, block in loadings.items():
        block.warn_of_tokens(label, [methods[label].prompt(options.prompt)])
    pictures: dict[tuple[str, int], Any] = {}
    entries, stems = [], stems_of(methods)

    def take(label: str) -> None:
        for seed in options.seed:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TriggerWarning)  # said before the painting began
                picture = one(pipe, options, seed, label, methods[label].prompt(options.prompt))
            seconds = time.perf_counter() - began
            name = f"{stems[label]}-{seed}.png"
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
    known = list(dict.fromkeys([*labels, *registry.names(), *registry.ALIASES, BARE]))
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
            own = recipe.method.policy() if recipe.method.name == name else None
            found[name] = labels.get(name) or Way(own or registry.from_dict({"name": name}))
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


def stems_of(labels: Iterable[str]) -> dict[str, str]:
    """Label -> the beginning of its pictures' file names: different ones, visible, and in one folder."""
    found: dict[str, str] = {}
    for label in labels:
        plain = stem = re.sub(r"[^\w.-]+", "-", label).lstrip(".") or "method"
        number = 1
        while stem in found.values():
            number += 1
            stem = f"{plain}-{number}"
        found[label] = stem
    return found


def one(pipe: Any, options: argparse.Namespace, seed: int, label: str, prompt: str) -> Any:
    """One picture.

    Raises:
        LoraweaveError: the pipeline refuses size, steps or guidance, or there is not enough memory.
    """
    call = {"prompt": prompt, "num_inference_steps": options.steps, **call_of(options)}
    try:
        return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0]
    except ValueError as error:
        raise LoraweaveError(
            f"{label}: {type(pipe).__name__} refuses these arguments ({str(error).strip().splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise LoraweaveError(
            f"{label}: not enough memory; take a smaller --size, and for composite the option chunk: 1"
        ) from error


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
