"""What a recipe needs that is not there, and where it comes from; nothing is loaded or looked up."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from loraweave.recipe.parts import ZOO, ZOO_PREFIX
from loraweave.recipe.recipe import Recipe

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Need:
    """A file, folder or hub repository that a recipe names.

    Attributes:
        what: where the recipe names it: ``base``, ``experts.hero``, ``data.tasks.qa.test``.
        source: as the recipe has it, relative to the working folder.
        state: ``here``, ``bundled``, ``hub`` (looked up there when it is needed) or ``missing``.
        origin: where to get it, if the recipe says so.
    """

    what: str
    source: str
    state: str
    origin: str | None = None


def needs(recipe: Recipe, folder: str | Path = ".") -> list[Need]:
    """Everything that ``recipe``, read from ``folder``, names, in its order, each source once."""
    named: dict[str, str] = {}

    def add(what: str, source: str | None) -> None:
        if source is not None:
            named.setdefault(source, what)

    add("base", recipe.base)
    for name, source in recipe.experts.items():
        add(f"experts.{name}", source)
    for name, merge in recipe.merged.items():
        for expert, source in merge.experts.items():
            add(f"merged.{name}.experts.{expert}", source)
    for name, task in recipe.data.by_task().items():
        place = f"data.tasks.{name}" if recipe.data.tasks else "data"
        add(f"{place}.train", task.train)
        add(f"{place}.test", task.test)
    for label, contender in recipe.compare.items():
        add(f"compare.{label}.saved", contender.saved)
        for field, place in contender.sources().items():
            add(f"compare.{label}.{field}", place)
    if recipe.testbed is not None:
        add("testbed.vae", recipe.testbed.vae)
        for name, element in recipe.testbed.elements.items():
            add(f"testbed.elements.{name}.references", element.references)
    if recipe.images is not None:
        add("images.clip", recipe.images.clip)
        for field, folders in (("references", recipe.images.references), ("pictures", recipe.images.pictures)):
            for name, place in folders.items():
                add(f"images.{field}.{name}", place)
    return [_need(recipe, what, source, Path(folder)) for source, what in named.items()]


def _need(recipe: Recipe, what: str, source: str, folder: Path) -> Need:
    origin = next(
        (
            said
            for pattern, said in recipe.origins.items()
            if fnmatch.fnmatchcase(source, pattern) or fnmatch.fnmatchcase(source, str(folder / pattern))
        ),
        None,
    )
    if source == ZOO or source.startswith(ZOO_PREFIX):
        return Need(what, source, "bundled")
    if Path(source).exists():
        return Need(what, source, "here", origin)
    # A name with an origin is a place on this machine; without one, "loras/qa" and "someone/qa" look the same.
    of_models = what in ("base", "testbed.vae", "images.clip") or what.startswith(("experts.", "merged."))
    # Repositories are folders, so a file's name is never one.
    hub = of_models and origin is None and _HUB.fullmatch(source) is not None and not source.endswith(".safetensors")
    return Need(what, source, "hub" if hub else "missing", origin)
