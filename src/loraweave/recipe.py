"""The recipe: a YAML file that says which experts are mixed on which base, how, and on what data.

```yaml
base: google/flan-t5-base
experts: {qa: loras/qa, nli: someone/flan-nli-lora}
method: {name: mole, granularity: block, balance: 0.5}
data: {train: train.jsonl, test: test.jsonl, metric: exact_match}
train: {steps: 800, learning_rate: 1.0e-2, batch_size: 12, seed: 0}
```

Paths are relative to the recipe's folder. ``zoo`` is the bundled base, ``zoo:NAME`` a bundled expert or generated task;
``zoo:images`` is the bundled image pipeline, ``zoo:images/NAME`` a LoRA or CLIP for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraweave import recipe_yaml
from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe_images import Images
from loraweave.recipe_merge import Merge
from loraweave.recipe_rivals import KINDS, Rival
from loraweave.recipe_testbed import Published, Testbed, small_form

if TYPE_CHECKING:
    from loraweave.experts.types import Expert

ZOO = "zoo"
ZOO_PREFIX = "zoo:"
ZOO_IMAGES = "zoo:images"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(_Part):
    """A policy by its name, with any of its options beside it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="mole", description="sum, linear, mole ...; further fields are the policy's own options")

    @model_validator(mode="after")
    def _known(self) -> Method:
        self.policy()
        return self

    def policy(self) -> Any:
        """The policy itself.

        Raises:
            LoraweaveError: unknown name or option, or an option that the policy refuses.
        """
        from loraweave import policies  # noqa: F401  # fills the registry
        from loraweave.policies import registry

        return registry.from_dict(self.model_dump())


class Contestant(Method):
    """A policy, or a yardstick that a comparison alone knows: ``fresh_lora``, ``merged``, ``best_single`` ..."""

    def policy(self) -> Any:
        """The policy or the yardstick.

        Raises:
            LoraweaveError: as :meth:`Method.policy`.
        """
        from loraweave.evaluation.yardsticks import YARDSTICKS
        from loraweave.policies import registry

        if self.name in YARDSTICKS:
            options = {key: value for key, value in self.model_dump().items() if key != "name"}
            return registry.build(YARDSTICKS[self.name], self.name, options)
        if self.name not in registry.names():
            raise unknown("method", self.name, [*registry.names(), *YARDSTICKS])
        return super().policy()


class Contender(Rival):
    """A method that takes part in a comparison, and what it does differently from ``train``; or no method of ours."""

    method: Contestant = Field(default_factory=Contestant)
    train: dict[str, Any] = Field(default={}, description="fields of 'train' that differ for this method")
    saved: str | None = Field(
        default=None,
        description="pictures: folder of a mixture that 'loraweave train' saved, with its method and gates",
    )

    @model_validator(mode="after")
    def _either(self) -> Contender:
        if self.saved is not None and self.model_fields_set & {"method", "train"}:
            raise LoraweaveError("a saved mixture brings its own trained method; remove what stands beside 'saved'")
        if self.kind is not None and self.model_fields_set & {"method", "train", "saved"}:
            raise LoraweaveError(f"{self.kind}: it is no mixture; remove 'method', 'train' and 'saved' beside it")
        return self


class Task(_Part):
    """The data of one task."""

    train: str | None = Field(default=None, description="jsonl file, or zoo:FAMILY/VARIANT")
    test: str | None = Field(default=None, description="jsonl file, or zoo:FAMILY/VARIANT")
    metric: str | None = Field(default=None, description="default: the data's metric, or the generated task's own")
    expert: str | None = Field(default=None, description="whose task it is, for retention; default: the task's name")

    @field_validator("metric")
    @classmethod
    def _metric(cls, name: str | None) -> str | None:
        return _known_metric(name)

    @field_validator("train", "test")
    @classmethod
    def _generated(cls, source: str | None) -> str | None:
        if source is not None and source.startswith(ZOO_PREFIX):
            from loraweave.zoo import tasks

            tasks.get(source.removeprefix(ZOO_PREFIX))
        return source


class Data(_Part):
    """What is trained and tested on: one ``train`` and ``test``, or several named ``tasks``."""

    train: str | None = Field(default=None, description="jsonl file with 'input' and 'target'")
    test: str | None = Field(default=None, description="jsonl file with 'input' and 'target'")
    metric: str | None = Field(default=None, description="default: exact_match")
    tasks: dict[str, Task] = Field(
        default={}, description="name -> its data; a task may be given as zoo:FAMILY/VARIANT"
    )
    train_items: int | None = Field(default=None, ge=1, description="most items per task to train on")
    test_items: int | None = Field(default=None, ge=1, description="most items per task to test on")

    @field_validator("metric")
    @classmethod
    def _metric(cls, name: str | None) -> str | None:
        return _known_metric(name)

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_form(cls, tasks: Any) -> Any:
        if not isinstance(tasks, Mapping):
            return tasks
        return {name: {"train": t, "test": t} if isinstance(t, str) else t for name, t in tasks.items()}

    @model_validator(mode="after")
    def _one_form(self) -> Data:
        if self.tasks and (self.train or self.test):
            raise LoraweaveError("expected either 'train' and 'test' or 'tasks', got both; move the files to a task")
        return self

    def by_task(self) -> dict[str, Task]:
        """Task -> its data; a single ``train`` and ``test`` is one task called ``test``."""
        if self.tasks:
            return dict(self.tasks)
        return {"test": Task(train=self.train, test=self.test)} if self.train or self.test else {}


class Train(_Part):
    """How gates are trained; what is left out takes the defaults of :func:`loraweave.train`."""

    steps: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    balance: float | None = Field(default=None, ge=0, description="weight of the balance loss; default: the method's")
    warmup_steps: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0)
    seeds: tuple[int, ...] = Field(default=(), description="of a comparison; default: just 'seed'")
    max_input_length: int | None = Field(default=None, ge=1, description="tokens")
    max_target_length: int | None = Field(default=None, ge=1, description="tokens")
    bf16: bool = False
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
            raise LoraweaveError(f"expected different numbers of at least 0, got {list(seeds)}")
        return seeds

    def options(self) -> dict[str, Any]:
        """What to pass on to :func:`loraweave.train`."""
        return self.model_dump(exclude={"seeds"}, exclude_defaults=True) | {"seed": self.seed}


class Generation(_Part):
    """How answers are generated."""

    max_new_tokens: int = Field(default=64, ge=1)
    num_beams: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    max_input_length: int | None = Field(default=None, ge=1, description="tokens; longer inputs are cut")


class Recipe(_Part):
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
        return {label: _contender(label, entry) for label, entry in compare.items()}

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
        for name in self.testbed.elements if self.testbed is not None else ():
            if name not in self.names:
                raise LoraweaveError(f"testbed.elements: {unknown('expert', name, self.names)}")
        if self.images is not None:
            self.images.check(self.names, self.train, data=bool(self.data.by_task()))
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
        small: take its small form, see :func:`loraweave.recipe_testbed.small_form`.

    Raises:
        LoraweaveError: the file cannot be read or is not YAML, or a field is unknown or wrong. One line per problem.
    """
    place = Path(path)
    content = recipe_yaml.read(place)
    if small:
        try:
            content = small_form(content)
        except LoraweaveError as error:
            raise LoraweaveError(f"{path}: {error}") from error
    for override in overrides:
        recipe_yaml.override(content, override)
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


def _known_metric(name: str | None) -> str | None:
    if name is not None:
        from loraweave.evaluation.metrics import get_metric

        get_metric(name)
    return name


def _contender(label: str, entry: Any) -> Any:
    """``mole``, ``{scale: 1}`` under the label ``mole``, ``{name: mole, train: {...}}``, ``{saved: folder}``, or
    ``{dreambooth: folder}`` -> a contender's fields."""
    if entry is None:
        entry = {}
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or ("method" in entry and not _mixes_random(label, entry)):
        return entry
    if "saved" in entry:
        # What stands beside it is refused by the contender itself.
        given = {name: value for name, value in entry.items() if name in ("saved", "train")}
        return given if given == entry else {**given, "method": {}}
    if any(kind in entry for kind in KINDS):
        return entry
    options = {"name": label, **entry}
    train = options.pop("train", {})
    if isinstance(inner := options.get("method"), str):
        options["method"] = {"name": inner}
    return {"method": options, "train": train}


def _mixes_random(label: str, entry: Mapping[str, Any]) -> bool:
    """Whether ``method`` is the option of ``random``, which has one called so, and not the long form's field."""
    if "name" in entry:
        return bool(entry["name"] == "random")
    whole = isinstance(entry["method"], Mapping) and entry["method"].get("name") == "random"
    return label == "random" and "train" not in entry and not whole


def _placed(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its data files, and those experts and bases that are folders, relative to ``folder``."""

    def inside(source: str) -> str:
        return str(folder / Path(source).expanduser())

    def file(source: str | None) -> str | None:
        return source if source is None or source.startswith(ZOO_PREFIX) else inside(source)

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
        label: contender.placed(inside).model_copy(update={"saved": file(contender.saved)} if contender.saved else {})
        for label, contender in recipe.compare.items()
    }
    return recipe.model_copy(update=placed | {"images": recipe.images and recipe.images.placed(folder, maybe)})


def _problems(error: ValidationError, inside: str = "") -> list[str]:
    """One line per problem: where it is, what was expected, what came."""
    return [_problem(one, inside) for one in error.errors()]


def _problem(problem: Any, inside: str) -> str:
    where = recipe_yaml.field_name((inside, *problem["loc"]) if inside else problem["loc"])
    given = recipe_yaml.short(problem["input"])
    if problem["type"] == "extra_forbidden":
        known = recipe_yaml.fields_at(Train if inside else Recipe, problem["loc"][:-1])
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
