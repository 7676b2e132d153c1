"""Parts of recipes that repeat published experiments: figures, where files come from, sets of elements to paint.

```yaml
published: {source: "MoLE, Table 6", scores: {mole: {bbh: 36.6}, lorahub: {bbh: 33.9}}}
origins: {"loras/*": https://example.org/loras}
testbed:
  elements: {hero: {category: character, name: a hero, triggers: [red hair]}, coat: {category: clothing, triggers:
  [coat]}}
  sizes: [2]
  always: character
  prompts: ["best quality, {triggers}"]
```
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from loraweave import zoo
from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe.parts import ZOO_IMAGES, Part

PIECEWISE = ("train", "generation", "published")
"""Sections of which a small form changes single fields; others it replaces."""


class Published(Part):
    """Figures of a paper, which stand beside ours."""

    source: str = Field(description="paper and table")
    scores: dict[str, dict[str, float]] = Field(description="method -> column -> figure, as printed")
    note: str | None = Field(default=None, description="what a reader must know to compare")
    tasks: dict[str, str] = Field(default={}, description="column -> the task here, where it has another name")

    @field_validator("scores")
    @classmethod
    def _some(cls, scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        if not scores or not all(scores.values()):
            raise LoraweaveError("expected at least one method with at least one figure")
        return scores

    def check(self, tasks: Collection[str]) -> None:
        """Raise :class:`LoraweaveError` where ``tasks`` names a column that was not printed, or a task that is not
        here."""
        columns = {column for of in self.scores.values() for column in of}
        for column, task in self.tasks.items():
            if column not in columns:
                raise LoraweaveError(f"published.tasks: {unknown('column', column, columns)}")
            if task not in tasks:
                raise LoraweaveError(f"published.tasks.{column}: {unknown('task', task, tasks)}")


class Element(Part):
    """What one expert of a test bed paints."""

    category: str = Field(default="element", description="a set has at most one element of each")
    name: str | None = Field(default=None, description="in words, for judges; default: the expert's name")
    triggers: tuple[str, ...] = Field(min_length=1, description="words that call it up, in the prompt")
    references: str | None = Field(
        default=None,
        description="folder of pictures that show it, or zoo:images/NAME, for image alignment",
    )

    @field_validator("references")
    @classmethod
    def _bundled(cls, references: str | None) -> str | None:
        if references is not None and zoo.is_bundled(references):
            name, known = references.removeprefix(f"{ZOO_IMAGES}/"), zoo.images.skills()
            if name not in known:
                raise unknown("bundled reference", references, [f"{ZOO_IMAGES}/{one}" for one in known])
        return references


@dataclass(frozen=True)
class CompositionSet:
    """Elements to be composed into one picture, by their experts' names; the one that is always there comes first."""

    experts: tuple[str, ...]

    @property
    def id(self) -> str:
        return "+".join(self.experts)


class Testbed(Part):
    """Which elements are composed with which, and how the pictures are painted."""

    elements: dict[str, Element] = Field(min_length=1, description="expert -> what it paints")
    sizes: tuple[int, ...] = Field(default=(), description="elements per set; default: one set of all")
    always: str | None = Field(default=None, description="category of which every set has exactly one")
    prompts: tuple[str, ...] = Field(
        default=("{triggers}",), min_length=1, description="{triggers}: all; {EXPERT}: that expert's first one"
    )
    negative: str | None = Field(default=None, description="what to keep away from")
    strength: float = Field(default=1.0, description="factor on every expert")
    seeds: tuple[int, ...] = Field(
        default=(0,), min_length=1, description="a picture of each prompt; a number N: 0 to N-1"
    )
    steps: int = Field(default=50, ge=1)
    guidance: float | None = Field(default=None, description="default: the pipeline's")
    size: tuple[int, int] | None = Field(default=None, description="width and height; default: the pipeline's")
    scheduler: str | None = Field(default=None, description="a scheduler of diffusers, by its class")
    scheduler_options: dict[str, Any] = Field(default={}, description="its settings that differ from the base's")
    vae: str | None = Field(default=None, description="folder or hub id of another VAE")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        return tuple(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @field_validator("elements")
    @classmethod
    def _told_apart(cls, elements: dict[str, Element]) -> dict[str, Element]:
        # Sets are named by their elements, and files by their sets: spaces become '_', '--' divides what follows.
        found: dict[str, str] = {}
        for name in elements:
            if "+" in name or "--" in name:
                raise LoraweaveError(f"elements.{name}: '+' and '--' join names here; rename the expert")
            if (other := found.setdefault(name.replace(" ", "_"), name)) != name:
                raise LoraweaveError(f"elements: pictures of {other!r} and {name!r} would share files; rename one")
        return elements

    @model_validator(mode="after")
    def _possible(self) -> Testbed:
        categories = [element.category for element in self.elements.values()]
        if self.always is not None and self.always not in categories:
            raise unknown("category", self.always, dict.fromkeys(categories))
        if self.always is not None and not self.sizes:
            raise LoraweaveError("always: goes with 'sizes'; without them there is one set of all elements")
        least, most = (1 if self.always is None else 2), len(set(categories))
        for size in self.sizes:
            if not min(least, most) <= size <= most:
                raise LoraweaveError(f"sizes: expected {least} to {most}, as there are {most} categories, got {size}")
        if len(set(self.sizes)) < len(self.sizes) or len(set(self.seeds)) < len(self.seeds):
            raise LoraweaveError("sizes, seeds: one comes twice")
        known = ["triggers", *self.elements]
        for prompt in self.prompts:
            for _, field in _pieces(prompt):
                if field and field not in known:
                    raise unknown("element in a prompt", field, known)
                if field not in ("", "triggers") and self.sizes:
                    raise LoraweaveError(f"prompts: {{{field}}} is not in every set; with 'sizes' write {{triggers}}")
        return self

    def placed(self, folder: Path) -> Testbed:
        """The same with folders of references relative to ``folder``."""
        elements = {
            name: element.model_copy(update={"references": str(folder / Path(element.references).expanduser())})
            if element.references and not zoo.is_bundled(element.references)
            else element
            for name, element in self.elements.items()
        }
        return self.model_copy(update={"elements": elements})

    def sets(self) -> list[CompositionSet]:
        """Every set: of each size, all choices of categories (``always`` among them), then all choices of elements."""
        if not self.sizes:
            return [CompositionSet(tuple(self.elements))]
        groups: dict[str, list[str]] = {}
        for expert, element in self.elements.items():
            groups.setdefault(element.category, []).append(expert)
        first = [] if self.always is None else [self.always]
        others = [category for category in groups if category != self.always]
        return [
            CompositionSet(experts)
            for size in self.sizes
            for chosen in itertools.combinations(others, size - len(first))
            for experts in itertools.product(*(groups[category] for category in (*first, *chosen)))
        ]

    def prompts_of(self, chosen: CompositionSet) -> list[str]:
        """The prompts with the triggers of a set."""
        words = [word for expert in chosen.experts for word in self.elements[expert].triggers]
        firsts = {expert: self.elements[expert].triggers[0] for expert in chosen.experts}
        known = {"triggers": ", ".join(words), **firsts}
        return ["".join(text + known.get(name, "") for text, name in _pieces(prompt)) for prompt in self.prompts]

    def described(self, chosen: CompositionSet) -> list[dict[str, Any]]:
        """The elements of a set as ``loraweave judge`` reads them."""
        found = []
        for expert in chosen.experts:
            element = self.elements[expert]
            name = element.name or expert
            label = name if element.category == "element" else f"{element.category} ({name})"
            found.append({"name": label, "features": list(element.triggers)})
        return found


def small_form(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what its section ``small`` says: fields of :data:`PIECEWISE`, other sections whole.

    Raises:
        LoraweaveError: there is no such section.
    """
    small = content.get("small")
    if not isinstance(small, Mapping) or not small:
        raise LoraweaveError("this recipe has no small form (section 'small')")
    merged = {key: value for key, value in content.items() if key != "small"}
    for key, value in small.items():
        both = key in PIECEWISE and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    # Null takes a section away.
    return {key: value for key, value in merged.items() if value is not None}


def _pieces(prompt: str) -> list[tuple[str, str]]:
    """``a {hero} here`` -> ``[("a ", "hero"), (" here", "")]``."""
    try:
        return [(text, field or "") for text, field, _, _ in string.Formatter().parse(prompt)]
    except ValueError as error:
        raise LoraweaveError(f"prompts: {prompt!r}: {error}; write {{triggers}}") from error
