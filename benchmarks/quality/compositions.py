"""Tasks that are one skill after another: what a single bundled LoRA, or the base, cannot do by itself."""

from __future__ import annotations

import random

from loraweave.zoo import tasks
from loraweave.zoo.tasks import Task

REVERSED = {"less": "relate/less", "sul": "translate/to_sul", "owner": "extract/owner_and_thing"}
"""Name -> the first of two skills, each of which has a bundled LoRA; the second is ``arrange/reverse``."""
HELD_OUT = ("number_words/swap", "dates/two_steps", "letters/backwards")
"""Tasks of the zoo that nothing bundled is trained on, and that two things it can do make up."""


def composed() -> dict[str, Task]:
    """Every composed task by its name in tables."""
    found = {f"{name}_reversed": in_reverse(tasks.get(first)) for name, first in REVERSED.items()}
    return found | {name.split("/")[1]: tasks.get(name) for name in HELD_OUT}


def in_reverse(first: Task) -> Task:
    """The answer of ``first``, its words backwards."""

    def draw(rng: random.Random) -> tuple[str, str]:
        body, answer = first.draw(rng)
        return body, " ".join(reversed(answer.split()))

    said = f"{first.description} The words of that backwards."
    return Task("composed", f"{first.variant}_reversed", f"{first.phrase} then in reverse", said, draw)
