"""The recipe: a YAML file that says which experts are mixed on which base, how, and on what data.

```yaml
base: google/flan-t5-base
experts: {qa: loras/qa, nli: someone/flan-nli-lora}
method: {name: mole, granularity: block, balance: 0.5}
data: {train: train.jsonl, test: test.jsonl, metric: exact_match}
train: {steps: 800, learning_rate: 1.0e-2, batch_size: 12, seed: 0}
```

Paths are relative to the recipe's folder. ``zoo`` is the bundled base, ``zoo:NAME`` a bundled expert or generated task;
``zoo:images`` is the bundled image pipeline, ``zoo:images/NAME`` a LoRA or CLIP for it, ``zoo:images/shifts/NAME``
SVDiff's shifts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe import reading
from loraweave.recipe.images import Images
from loraweave.recipe.merge import Merge
from loraweave.recipe.methods import Contender, Method, contender_fields
from loraweave.recipe.parts import ZOO, ZOO_IMAGES, ZOO_PREFIX, Data, Generation, Part, Train
from loraweave.recipe.testbeds import Published, Testbed, small_form

if TYPE_CHECKING:
    from loraweave.experts.types import Expert


class Recipe(Part):
    """Everything from which a mixture is built, trained and judged."""

    base: str = Field(description="folder or hub id of the base model, or 'zoo', or 'zoo:images'")
    experts: dict[str, str] = Field(description="name -> PEFT folder, hub id or zoo:NAME; or a list; or all of 'zoo'")
    merged: dict[str, Merge] = Field(default={}, description="name -> one more expert, made by merging others")
    method: Method = Field(default_factory=Method, description="how to mix")
    compare: dict[str, Contender] = Field(
        default={}, description="label -> method (with 'train' for what it trains differently); or a list of names"
    )
    data: Data = Data()
    train: Train = Train()
    generation: Generation = Generation()
    published: Published | None = Field(default=None, description="a paper's figures, shown beside ours")
    origins: dict[str, str] = Field(default={}, description="pattern of files (loras/*) -> where they come from")
    testbed: Testbed | None = Field(default=None, description="sets of experts to compose into pictures")
    images: Images | None = Field(default=None, description="what gates over a diffusers pipeline are taught by")
    small: dict[str, Any] = Field(default={}, exclude=True, description="sections as --small takes them")

    @field_validator("experts", mode="before")
    @classmethod
    def _named(cls, experts: Any) -> Any:
        if experts == ZOO:
            from loraweave import zoo

            return {name: ZOO_PREFIX + name for name in zoo.experts()}
        if experts == ZOO_IMAGES:
            from loraweave.zoo import images

            return {name: f"{ZOO_IMAGES}/{name}" for name in images.loras()}
        if isinstance(experts, list | tuple) and all(isinstance(source, str) for source in experts):
            named = {source.rstrip("/").split("/")[-1].split(":")[-1]: source for source in experts}
            if len(named) < len(experts):
                raise LoraweaveError("two of the sources would have the same name; write 'name: source'")
            return named
        return experts

    @field_validator("experts")
    @classmethod
    def _some(cls, experts: dict[str, str]) -> dict[str, str]:
        from loraweave import zoo

        for source in experts.values():
            zoo.local(source)  # raises for a bundled one that there is not
        return experts

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, method: Any) -> Any:
        return {"name": method} if isinstance(method, str) else method

    @field_validator("compare", mode="before")
    @classmethod
    def _contenders(cls, compare: Any) -> Any:
        if isinstance(compare, list | tuple):
            labels = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in compare]
            if len({str(label) for label in labels}) < len(labels):
                raise LoraweaveError("two methods have the same name; give labels: {mine: {name: mole, ...}, ...}")
            compare = dict(zip(map(str, labels), compare, strict=True))
        if not isinstance(compare, Mapping):
            return compare
        return {label: contender_fields(label, entry) for label, entry in compare.items()}

    @model_validator(mode="after")
    def _experts_of_tasks(self) -> Recipe:
        if not self.names:
            raise LoraweaveError("experts: expected at least one expert, got none")
        if len(set(self.names)) < len(self.names):
            raise LoraweaveError("merged: a merged expert has the name of another expert; give it one of its own")
        for name, task in self.data.tasks.items():
            if task.expert is not None and task.expert not in self.names:
                problem = unknown("expert", task.expert, self.names)
                raise LoraweaveError(f"data.tasks.{name}.expert: {problem}")
        for label, contender in self.compare.items():
            self.training(label, contender)
            contender.check(label, self.names)
            if contender.per_task and self.testbed is not None:
                raise LoraweaveError(f"compare.{label}.per_task: pictures are learned from as one task; remove it")
        for name in self.testbed.elements if self.testbed is not None else ():
            if name not in self.names:
                raise LoraweaveError(f"testbed.elements: {unknown('expert', name, self.names)}")
        if self.published is not None:
            self.published.check(self.data.by_task())
        if self.images is not None:
            self.images.check(self.names, self.train, data=bool(self.data.by_task()))
            if self.testbed is not None:
                self.images.check_prompts(self.testbed.elements, "element of the test bed")
        return self

    def training(self, label: str = "", contender: Contender | None = None) -> Train:
        """``train``, with what ``contender`` (called ``label``) does differently.

        Raises:
            LoraweaveError: the contender has a field that ``train`` does not, or a value that it refuses.
        """
        if contender is None or not contender.train:
            return self.train
        if "seeds" in contender.train or "seed" in contender.train:
            raise LoraweaveError(f"compare.{label}.train: every method takes the seeds of 'train'; remove them here")
        try:
            return Train(**(self.train.model_dump(exclude_unset=True) | contender.train))
        except ValidationError as error:
            raise LoraweaveError("; ".join(_problems(error, f"compare.{label}.train"))) from error

    @property
    def names(self) -> list[str]:
        """The experts' names, merged ones last."""
        return [*self.experts, *self.merged]

    def sources(self) -> dict[str, str | Expert]:
        """What to pass on to :func:`loraweave.attach`: name -> source, or the merged expert itself."""
        return {**self.experts, **{name: merge.expert(name) for name, merge in self.merged.items()}}

    def own_tasks(self) -> dict[str, str]:
        """Task -> the expert whose task it is; tasks that are nobody's are left out."""
        owners = {name: task.expert or name for name, task in self.data.tasks.items()}
        return {task: expert for task, expert in owners.items() if expert in self.names}

    def to_dict(self) -> dict[str, Any]:
        """The method and what else was set, ready for JSON or YAML."""
        content: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        return content | {"method": self.method.model_dump()}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, small: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``train.steps=100``, ``method.scale=4``: fields to set after reading, values in YAML.
        small: take its small form, see :func:`loraweave.recipe.testbeds.small_form`.

    Raises:
        LoraweaveError: the file cannot be read or is not YAML, or a field is unknown or wrong. One line per problem.
    """
    place = Path(path)
    content = reading.read(place)
    if small:
        try:
            content = small_form(content)
        except LoraweaveError as error:
            raise LoraweaveError(f"{path}: {error}") from error
    for override in overrides:
        reading.override(content, override)
    return check_recipe(content, str(path), place.parent)


def check_recipe(content: Mapping[str, Any], name: str, folder: Path) -> Recipe:
    """The recipe in ``content``, with paths relative to ``folder``; ``name`` stands in front of each problem."""
    try:
        recipe = Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise LoraweaveError("\n".join(f"{name}: {problem}" for problem in _problems(error))) from error
    return _placed(recipe, folder)


def recipe_schema() -> str:
    """The JSON schema of recipes, for editors that complete YAML."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def _placed(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its data files, and those experts and bases that are folders, relative to ``folder``."""

    def inside(source: str) -> str:
        return str(folder / Path(source).expanduser())

    def named(source: str) -> str:
        return source if source.startswith(ZOO_PREFIX) else inside(source)

    def file(source: str | None) -> str | None:
        return None if source is None else named(source)

    def maybe(source: str) -> str:
        here = folder / Path(source).expanduser()
        return str(here) if here.exists() else source

    tasks = {
        name: task.model_copy(update={"train": file(task.train), "test": file(task.test)})
        for name, task in recipe.data.tasks.items()
    }
    data = recipe.data.model_copy(
        update={"train": file(recipe.data.train), "test": file(recipe.data.test), "tasks": tasks}
    )
    experts = {name: maybe(source) for name, source in recipe.experts.items()}
    merged = {name: merge.placed(maybe) for name, merge in recipe.merged.items()}
    placed = {"base": maybe(recipe.base), "experts": experts, "merged": merged, "data": data}
    placed |= {"testbed": recipe.testbed and recipe.testbed.placed(folder)}
    placed["compare"] = {
        label: contender.placed(named).model_copy(update={"saved": file(contender.saved)} if contender.saved else {})
        for label, contender in recipe.compare.items()
    }
    return recipe.model_copy(update=placed | {"images": recipe.images and recipe.images.placed(folder, maybe)})


def _problems(error: ValidationError, inside: str = "") -> list[str]:
    """One line per problem: where it is, what was expected, what came."""
    return [_problem(one, inside) for one in error.errors()]


def _problem(problem: Any, inside: str) -> str:
    where = reading.field_name((inside, *problem["loc"]) if inside else problem["loc"])
    given = reading.short(problem["input"])
    if problem["type"] == "extra_forbidden":
        known = reading.fields_at(Train if inside else Recipe, problem["loc"][:-1])
        wrong = unknown("field", str(problem["loc"][-1]), known)
        return f"{where}: {wrong}"
    if problem["type"] == "missing":
        return f"{where}: this field is missing"
    if problem["type"] == "value_error":
        cause = problem["ctx"]["error"]
        return f"{where}: {cause}" if where else str(cause)
    said = problem["msg"].removeprefix("Input should be ")
    if problem["type"] in ("model_type", "dict_type"):
        said = "fields, 'name: value'"
    elif said.startswith(("greater", "less")):
        said = f"a number {said}"
    return f"{where}: expected {said}, got {given}"
