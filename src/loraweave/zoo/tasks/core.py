"""What a generated task is, and how its items are drawn and split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from loraweave.errors import LoraweaveError

Split = Literal["train", "validation", "test"]
Draw = Callable[[random.Random], tuple[str, str]]
"""Draws one item: the text after the task phrase, and the answer."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_PATIENCE = 4000  # consecutive draws without a new item after which the space counts as used up


def split_of(text: str) -> Split:
    """The split that owns an input: 80 % train, 10 % validation, 10 % test, fixed by a stable hash of the text."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


@dataclass(frozen=True)
class Task:
    """One generated task, e.g. ``sort/a_to_z``.

    Attributes:
        family: what kind of task it is, e.g. ``sort``.
        variant: which one of its kind, e.g. ``a_to_z``.
        phrase: the words every input starts with.
        description: one sentence for people.
        draw: draws one item, without the phrase.
        metric: how answers are judged.
    """

    family: str
    variant: str
    phrase: str
    description: str
    draw: Draw = field(repr=False, compare=False)
    metric: str = "exact_match"

    @property
    def name(self) -> str:
        """``family/variant``."""
        return f"{self.family}/{self.variant}"

    def sample(self, n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
        """Draws ``n`` different items of one split; the same arguments always give the same items.

        Args:
            n: how many items, at least 0.
            seed: of the draw. Different seeds may share items; different splits never do.
            split: ``train``, ``validation`` or ``test``.

        Returns:
            ``n`` rows with the keys ``input`` and ``target``, no input twice.

        Raises:
            LoraweaveError: a ``ValueError``, if ``n`` is negative, ``split`` is unknown, or the task has fewer items.
        """
        if n < 0:
            raise LoraweaveError(f"task {self.name!r}: expected n of at least 0, got {n}")
        if split not in SPLITS:
            raise LoraweaveError(f"task {self.name!r}: expected a split out of {', '.join(SPLITS)}, got {split!r}")
        rng = random.Random(f"{self.name}|{split}|{seed}")
        rows: dict[str, str] = {}
        idle = 0
        while len(rows) < n:
            body, target = self.draw(rng)
            text = f"{self.phrase}: {body}"
            if split_of(text) == split and text not in rows:
                rows[text] = target
                idle = 0
                continue
            idle += 1
            if idle > _PATIENCE:
                raise LoraweaveError(
                    f"task {self.name!r}: the {split} split has about {len(rows)} items, {n} were asked for; "
                    "ask for fewer"
                )
        return [{"input": text, "target": target} for text, target in rows.items()]
