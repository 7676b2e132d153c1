"""YAML for recipes: read strictly, changed by ``dotted.field=value``."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel

from loraweave.errors import LoraweaveError

LARGEST = 1_000_000
"""Bytes; no recipe is as large."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which nothing is dropped in silence: a key that comes twice and references are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "references (*name) are not for recipes", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-2 for text, because it has no dot; people do not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file.

    Raises:
        LoraweaveError: no such file, too large, not UTF-8, not YAML, or not a mapping at its top.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise LoraweaveError(f"no such recipe: {str(path)!r}; expected a YAML file") from error
    except OSError as error:
        raise LoraweaveError(f"cannot read the recipe {str(path)!r}: {error.strerror or error}") from error
    if len(raw) > LARGEST:
        raise LoraweaveError(f"{path}: larger than {LARGEST:,} bytes, so it is no recipe; expected a YAML file")
    try:
        content = _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LoraweaveError(f"{path}: not UTF-8 text ({error.reason}); expected a YAML file") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise LoraweaveError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise LoraweaveError(f"{path}: expected a recipe, 'base: ...' and so on, got {short(content)}")
    return content


def override(content: dict[str, Any], assignment: str) -> None:
    """Set a field of ``content`` as ``train.steps=100`` says; the value is YAML.

    Raises:
        LoraweaveError: not of that form, or a part of the path is a plain value.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise LoraweaveError(f"override {assignment!r}: expected FIELD=VALUE, for example train.steps=100")
    try:
        value = _parse(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise LoraweaveError(f"override {assignment!r}: the value is not YAML: {_one_line(error)}") from error
    place: Any = content
    for depth, key in enumerate(keys[:-1], start=1):
        inner = place.setdefault(key, {})
        if key == "method" and isinstance(inner, str):
            inner = place[key] = {"name": inner}
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            where = ".".join(keys[:depth])
            raise LoraweaveError(f"override {assignment!r}: {where} is {short(inner)} and has no fields")
        place = inner
    place[keys[-1]] = value


def field_name(place: Iterable[str | int]) -> str:
    """``("data", "tasks", "sort")`` -> ``data.tasks.sort``."""
    return ".".join(map(str, place))


def fields_at(model: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The fields of the part of ``model`` that ``place`` leads to."""
    part: Any = model
    for key in place:
        if isinstance(part, type) and issubclass(part, BaseModel):
            part = _section(part.model_fields[str(key)].annotation)
        else:
            part = next((a for a in getattr(part, "__args__", ()) if isinstance(a, type) and a is not str), None)
    return list(part.model_fields) if isinstance(part, type) and issubclass(part, BaseModel) else []


def _section(annotation: Any) -> Any:
    """``Testbed | None`` -> ``Testbed``; others as they are."""
    if not isinstance(annotation, UnionType):
        return annotation
    return next((a for a in annotation.__args__ if isinstance(a, type) and issubclass(a, BaseModel)), annotation)


def short(value: Any) -> str:
    """``value`` as Python writes it, cut where it is long."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 60
    return cut.repr(value)


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _one_line(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())
