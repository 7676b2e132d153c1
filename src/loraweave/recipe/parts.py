"""What all sections of a recipe have in common, and the sections of text: data, training, generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loraweave.errors import LoraweaveError

ZOO = "zoo"
ZOO_PREFIX = "zoo:"
ZOO_IMAGES = "zoo:images"


class Part(BaseModel):
    """A section: unknown fields are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Task(Part):
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


class Data(Part):
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


LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one, and would say so in the middle of the work."""


class Train(Part):
    """How gates are trained; what is left out takes the defaults of :func:`loraweave.train`."""

    steps: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    balance: float | None = Field(default=None, ge=0, description="weight of the balance loss; default: the method's")
    warmup_steps: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    seeds: tuple[int, ...] = Field(default=(), description="of a comparison; default: just 'seed'")
    max_input_length: int | None = Field(default=None, ge=1, description="tokens")
    max_target_length: int | None = Field(default=None, ge=1, description="tokens")
    bf16: bool = False
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or any(not 0 <= seed <= LARGEST_SEED for seed in seeds):
            raise LoraweaveError(f"expected different numbers of 0 to {LARGEST_SEED}, got {list(seeds)}")
        return seeds

    def options(self) -> dict[str, Any]:
        """What to pass on to :func:`loraweave.train`."""
        return self.model_dump(exclude={"seeds"}, exclude_defaults=True) | {"seed": self.seed}


class Generation(Part):
    """How answers are generated."""

    max_new_tokens: int = Field(default=64, ge=1)
    num_beams: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    max_input_length: int | None = Field(default=None, ge=1, description="tokens; longer inputs are cut")


def _known_metric(name: str | None) -> str | None:
    if name is not None:
        from loraweave.evaluation.metrics import get_metric

        get_metric(name)
    return name
