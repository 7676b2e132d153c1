"""Seeded procedural tasks in the manner of BIG-Bench Hard; they need nothing but the standard library.

>>> from loraweave.zoo import tasks
>>> rows = tasks.get("sort/a_to_z").sample(100, seed=0, split="train")
"""

from __future__ import annotations

from loraweave.errors import LoraweaveError, unknown
from loraweave.zoo.tasks import (
    brackets,
    calendar,
    cipher,
    compare,
    counting,
    grammar,
    lexical,
    lists,
    logic,
    motion,
    numbers,
    records,
    tracking,
)
from loraweave.zoo.tasks.core import SPLITS, Split, Task, split_of

_MODULES = (
    brackets, calendar, cipher, compare, counting, grammar, lexical, lists, logic, motion, numbers, records, tracking,
)  # fmt: skip


def _collect() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for module in _MODULES:
        for task in module.TASKS:
            if task.name in found:
                raise LoraweaveError(f"task {task.name!r} is defined twice; rename one of the two")
            found[task.name] = task
    return dict(sorted(found.items()))


_TASKS = _collect()


def names() -> tuple[str, ...]:
    """Every task as ``family/variant``, sorted."""
    return tuple(_TASKS)


def families() -> tuple[str, ...]:
    """Every family once, sorted."""
    return tuple(sorted({task.family for task in _TASKS.values()}))


def get(name: str) -> Task:
    """The task called ``name``; an unknown one is an error that suggests the nearest names."""
    try:
        return _TASKS[name]
    except KeyError:
        raise unknown("task", name, _TASKS) from None


__all__ = ["SPLITS", "Split", "Task", "families", "get", "names", "split_of"]
