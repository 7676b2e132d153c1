"""Family ``cipher``: a key given in the input replaces words."""

from __future__ import annotations

import random

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import COLOURS, SIZES, THINGS

_SHORT = THINGS[:30]


def _key(back: bool, size: int, shown: int, reverse: bool = False) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        plain, secret = rng.sample(COLOURS + SIZES, size), rng.sample(_SHORT, size)
        pairs = list(zip(plain, secret, strict=True))
        message = [rng.choice(pairs) for _ in range(shown)]
        body = " ; ".join(f"{a} is {b}" for a, b in pairs)
        source, target = (
            ([b for _, b in message], [a for a, _ in message]) if back else tuple(zip(*message, strict=True))
        )
        return f"{body} . {' '.join(source)}", " ".join(reversed(target) if reverse else target)

    return draw


def _replace(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, 4)
    old, new = rng.choice(words), rng.choice([word for word in THINGS if word not in words])
    return f"{old} by {new} in {' '.join(words)}", " ".join(new if word == old else word for word in words)


def _remove(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, rng.randint(4, 5))
    out = rng.choice(words)
    return f"{out} in {' '.join(words)}", " ".join(word for word in words if word != out)


TASKS = (
    Task("cipher", "one", "cipher one word", "One word by a key of three.", _key(False, 3, 1)),
    Task("cipher", "encode", "cipher encode", "Three words by a key of three.", _key(False, 3, 3)),
    Task("cipher", "decode", "cipher decode", "Three words back by a key of three.", _key(True, 3, 3)),
    Task("cipher", "encode_reversed", "cipher encode reversed", "Encoded, last word first.", _key(False, 3, 3, True)),
    Task("cipher", "replace", "cipher replace", "One word replaced in a list.", _replace),
    Task("cipher", "remove", "cipher remove", "One word left out of a list.", _remove),
)
