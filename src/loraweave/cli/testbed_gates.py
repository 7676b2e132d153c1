"""The training part of ``loraweave testbed``: contestants that learn are taught, once, before anything is painted."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraweave import persistence
from loraweave.cli.image_gates import learn_gates, open_base, unfinished
from loraweave.cli.painting import Way
from loraweave.cli.testbed_settings import GATES, Noted, folders
from loraweave.errors import LoraweaveError
from loraweave.experts.resolve import resolve_experts
from loraweave.files import write_json_atomic
from loraweave.integrations.host import open_host
from loraweave.mixture import Mixture, attach
from loraweave.policies import Sum
from loraweave.recipe import Contender, Contestant, Method, Recipe
from loraweave.recipe.images import Images
from loraweave.recipe.testbeds import Testbed
from loraweave.training.images.checkpoints import whole
from loraweave.training.images.train import SAMPLES
from loraweave.training.learn import learns

BEGUN = "begun.json"
"""Beside checkpoints: by what the gates are trained."""


@dataclass(frozen=True)
class Course:
    """A contestant whose gates the test bed trains.

    Attributes:
        label: of the contestant.
        recipe: of the mixture: all experts of the test bed's elements, the contestant's method, how it is trained.
        images: what it is taught by.
        strength: of the test bed, on every expert.
        place: where the mixture is saved.
    """

    label: str
    recipe: Recipe
    images: Images
    strength: float
    place: Path

    @property
    def noted(self) -> Noted:
        """By what its gates are trained, for the notes beside the pictures."""
        return {
            "experts": self.recipe.names,
            "train": self.recipe.train.options(),
            "images": self.images.model_dump(mode="json", exclude_unset=True),
        }

    @property
    def cost(self) -> Path:
        """The file that says what the training took."""
        return self.place.with_name(f"{self.place.name}.json")

    def done(self) -> bool:
        """Whether the gates are there.

        Raises:
            LoraweaveError: those that are there were trained with other settings.
        """
        if not (self.place / persistence.MIXTURE).exists():
            return False
        try:
            before = json.loads((self.place / persistence.MIXTURE).read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LoraweaveError(f"cannot read the mixture in {str(self.place)!r} ({error}); remove it") from error
        if before != json.loads(json.dumps(self._saved_recipe())):
            raise LoraweaveError(
                f"{self.place}: its gates were trained with other settings; choose another folder, or remove it"
            )
        return True

    def check(self, mixture: Mixture) -> None:
        """Raise :class:`LoraweaveError` if an interrupted training of these gates was begun with other settings."""
        kept = unfinished(self.place)
        if not whole(kept):
            return
        try:
            before = _flat(json.loads((kept / BEGUN).read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise LoraweaveError(f"{kept}: cannot read by what its training was begun ({error}); remove it") from error
        now = _flat(json.loads(json.dumps(self._begun(mixture))))
        if others := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
            raise LoraweaveError(
                f"{kept}: this training was begun with other settings ({', '.join(others)}); go on with the same, or "
                "remove the folder"
            )

    def train(self, mixture: Mixture) -> None:
        """Train the gates and save them; an interrupted run goes on from its last checkpoint.

        Raises:
            LoraweaveError: several processes were started, or see :meth:`check` and :func:`loraweave.train_images`.
        """
        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise LoraweaveError(
                f"compare.{self.label}: a test bed trains in one process, got {processes}; let them share "
                f"'loraweave train', and name what it saves: compare.{self.label}: {{saved: FOLDER}}"
            )
        self.check(mixture)
        kept, method, experts = unfinished(self.place), self.recipe.method, self.recipe.names
        write_json_atomic(kept / BEGUN, self._begun(mixture))
        print(f"{self.label}: training gates ({method.name}) over {', '.join(experts)}", flush=True)
        mixture.policy = method.policy()
        progress = f"training {self.label}" if sys.stderr.isatty() else False
        result = learn_gates(mixture, self.images, self.recipe.train, kept, progress=progress)
        seconds = result.earlier_seconds + result.seconds
        took = {"train_seconds": round(seconds, 1), "steps": result.steps, "loss": result.loss}
        write_json_atomic(self.cost, took)
        if (samples := kept / SAMPLES).is_dir():
            shutil.copytree(samples, self.place.with_name(f"{self.place.name}.{SAMPLES}"), dirs_exist_ok=True)
        # The experts' files do not have the test bed's strength, nor are merged ones in any file.
        copied = self.strength != 1 or bool(self.recipe.merged)
        persistence.save(mixture, self.place, copy_experts=copied, recipe=self._saved_recipe())
        if kept.is_dir():
            shutil.rmtree(kept)
        print(
            f"{self.label}: {result.steps} steps in {seconds:.0f} s, mean loss {result.loss:.3f}; "
            f"its gates are in {self.place}",
            flush=True,
        )

    def _saved_recipe(self) -> dict[str, Any]:
        return self.recipe.to_dict() | ({} if self.strength == 1 else {"strength": self.strength})

    def _begun(self, mixture: Mixture) -> dict[str, Any]:
        files = {expert.name: expert.sha256 for expert in mixture.sources}
        return {**self._saved_recipe(), "strength": self.strength, "files": files}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{train: {seed: 5}}`` -> ``{train.seed: 5}``, so that a message can name what differs."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


class Classroom:
    """The pipeline with all experts of the test bed, for training; loaded when it is first needed, gone with the block.

    It is not the one that paints, which has another scheduler and may be in half precision.
    """

    def __init__(self, recipe: Recipe, testbed: Testbed) -> None:
        self.recipe, self.testbed = recipe, testbed

    @cached_property
    def pipe(self) -> Any:
        return open_base(self.recipe)

    @cached_property
    def mixture(self) -> Mixture:
        sources = {n: source for n, source in self.recipe.sources().items() if n in self.testbed.elements}
        experts = resolve_experts(sources, open_host(self.pipe, None).read)
        return attach(self.pipe, [expert.scaled(self.testbed.strength) for expert in experts], Sum())

    def learns(self, label: str, policy: Any) -> bool:
        """Whether a contestant has gates to train.

        Raises:
            LoraweaveError: it learns, but by no gates, or cannot be attached to a pipeline.
        """
        try:
            self.mixture.policy = policy
        except LoraweaveError as error:
            raise LoraweaveError(f"compare.{label}: {error}") from error
        if learns(self.mixture) and not any(p.requires_grad for _, p in self.mixture.gate_parameters()):
            raise LoraweaveError(f"compare.{label}: {policy.name} does not learn from pictures; leave it out")
        return learns(self.mixture)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "mixture" in self.__dict__:
            self.mixture.detach()
        self.__dict__.clear()
        # A mixture refers to itself, and its base should not stay in memory beside the one that paints.
        gc.collect()


def courses(
    recipe: Recipe, room: Classroom, out: Path, ways: Mapping[str, Way], before: Mapping[str, Any] | None
) -> dict[str, Course]:
    """Label -> the training of each contestant that learns; none where the recipe does not say by what.

    Args:
        recipe: with a test bed.
        room: where contestants are looked at that no pictures tell about.
        out: of the pictures.
        ways: all contestants.
        before: what is noted beside pictures that are there.

    Raises:
        LoraweaveError: a contestant cannot learn from pictures.
    """
    if recipe.images is None:
        return {}
    methods = {} if before is None else before["methods"]
    contenders = recipe.compare or {recipe.method.name: Contender(method=Contestant(**recipe.method.model_dump()))}
    found = {}
    for label, way in ways.items():
        if way.saved is not None or way.rival is not None:
            continue
        if "trained" in methods[label] if label in methods else room.learns(label, way.policy):
            place = out / GATES / folders([label])[label]
            found[label] = _course(recipe, room.testbed, label, contenders[label], place)
    return found


def _course(recipe: Recipe, testbed: Testbed, label: str, contender: Contender, place: Path) -> Course:
    assert recipe.images is not None
    known = testbed.elements

    def inside(of_experts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in of_experts.items() if name in known}

    fields = ("concepts", "references", "boxes")
    images = recipe.images.model_copy(
        update={f: inside(getattr(recipe.images, f)) for f in fields if getattr(recipe.images, f)}
    )
    train = recipe.training(label, contender)
    # One picture of each method, so one training: the first seed's.
    train = train.model_copy(update={"seed": (train.seeds or (train.seed,))[0], "seeds": ()})
    own = Recipe(
        base=recipe.base,
        experts=inside(recipe.experts),
        merged=inside(recipe.merged),
        method=Method(**contender.method.model_dump()),
        train=train,
        images=images,
    )
    return Course(label, own, images, testbed.strength, place)
