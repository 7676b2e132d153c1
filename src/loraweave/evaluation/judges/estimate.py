"""What a run will cost, before it costs anything.

Rule: a token per four characters of text; a picture, scaled to fit into 2048 x 2048 and then to a shorter side of
768 pixels (never enlarged), costs 85 tokens and 170 per 512 x 512 tile begun, as OpenAI publishes for high detail;
an answer has 300 tokens. Servers differ, so this is a guide; repeats of answers that cannot be read come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.question import Question

ANSWER_TOKENS = 300


@dataclass(frozen=True)
class Estimate:
    """What asking costs: requests, pictures sent, tokens by the rule of this module."""

    calls: int
    pictures: int
    tokens_in: int
    tokens_out: int

    def price(self, per_million_in: float, per_million_out: float) -> float:
        """In the currency of the two prices, each for a million tokens."""
        return (self.tokens_in * per_million_in + self.tokens_out * per_million_out) / 1e6

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def estimate(questions: Sequence[Question]) -> Estimate:
    """What asking ``questions`` once costs.

    Raises:
        LoraweaveError: a picture cannot be read.
    """
    sizes: dict[Path, int] = {}
    tokens = 0
    for question in questions:
        tokens += math.ceil(len(question.text) / 4)
        for method in (question.first, question.second):
            path = question.pair.pictures[method]
            if path not in sizes:
                sizes[path] = picture_tokens(*_size(path))
            tokens += sizes[path]
    n = len(questions)
    return Estimate(n, 2 * n, tokens, ANSWER_TOKENS * n)


def picture_tokens(width: int, height: int) -> int:
    """Tokens of a picture of this size in pixels."""
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    # Rounded to whole pixels first: 767.9999 must not become another tile.
    tiles = [math.ceil(max(1, round(side * scale)) / 512) for side in (width, height)]
    return 85 + 170 * tiles[0] * tiles[1]


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise LoraweaveError(f"cannot read the picture {str(path)!r}: {error}") from error
