"""Methods in a recipe: what mixes, and what takes part in a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe.parts import Part
from loraweave.recipe.rivals import KINDS, Rival


class Method(Part):
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
    per_task: bool = Field(
        default=False, description="learn anew for each task, from its examples alone, and answer it with that"
    )
    saved: str | None = Field(
        default=None,
        description="pictures: folder of a mixture that 'loraweave train' saved, with its method and gates",
    )

    @model_validator(mode="after")
    def _either(self) -> Contender:
        if self.saved is not None and self.model_fields_set & {"method", "train", "per_task"}:
            raise LoraweaveError("a saved mixture brings its own trained method; remove what stands beside 'saved'")
        if self.kind is not None and self.model_fields_set & {"method", "train", "per_task", "saved"}:
            raise LoraweaveError(
                f"{self.kind}: it is no mixture; remove 'method', 'train', 'per_task' and 'saved' beside it"
            )
        return self


def contender_fields(label: str, entry: Any) -> Any:
    """``mole``, ``{scale: 1}`` under the label ``mole``, ``{name: mole, train: {...}, per_task: true}``,
    ``{saved: folder}``, or ``{dreambooth: folder}`` -> a contender's fields."""
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
    beside = {name: options.pop(name) for name in ("train", "per_task") if name in options}
    if isinstance(inner := options.get("method"), str):
        options["method"] = {"name": inner}
    return {"train": {}, **beside, "method": options}


def _mixes_random(label: str, entry: Mapping[str, Any]) -> bool:
    """Whether ``method`` is the option of ``random``, which has one called so, and not the long form's field."""
    if "name" in entry:
        return bool(entry["name"] == "random")
    whole = isinstance(entry["method"], Mapping) and entry["method"].get("name") == "random"
    return label == "random" and not {"train", "per_task"} & set(entry) and not whole
