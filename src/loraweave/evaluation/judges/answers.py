"""The folder of answers: a file each, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraweave.errors import LoraweaveError
from loraweave.evaluation.judges.question import DIMENSIONS, Question
from loraweave.files import write_json_atomic

FOLDER = "answers"


class Answers:
    """What the judge has said so far.

    Args:
        folder: of the whole run; answers lie in ``answers`` inside it.
        model: whose answers.
    """

    def __init__(self, folder: str | os.PathLike[str], model: str) -> None:
        self.folder = Path(folder) / FOLDER
        self.model = model

    def path(self, question: Question) -> Path:
        return self.folder / question.key(self.model)

    def get(self, question: Question) -> dict[str, Any] | None:
        """The stored answer, or None.

        Raises:
            LoraweaveError: the file is damaged.
        """
        path = self.path(question)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise LoraweaveError(f"cannot read the answer {str(path)!r} ({error}); delete it to ask again") from error
        if not isinstance(content, dict) or not (_scored(content) or isinstance(content.get("failed"), str)):
            raise LoraweaveError(f"{path}: expected 'scores' or 'failed'; delete it to ask again")
        return content

    def put(self, question: Question, content: Mapping[str, Any]) -> None:
        """Store an answer, all of it or nothing."""
        head = {
            "id": question.pair.id,
            "first": question.first,
            "second": question.second,
            "sha256": list(question.digests),
            "model": self.model,
        }
        write_json_atomic(self.path(question), head | dict(content))

    def open(self, asked: Sequence[Question], *, again: bool = False) -> list[Question]:
        """The questions without an answer; with ``again`` also those that failed."""
        found = ((question, self.get(question)) for question in asked)
        return [q for q, answer in found if answer is None or (again and "failed" in answer)]


def _scored(content: Mapping[str, Any]) -> bool:
    scores = content.get("scores")
    return isinstance(scores, dict) and all(
        isinstance(scores.get(place), dict) and all(isinstance(scores[place].get(d), int | float) for d in DIMENSIONS)
        for place in ("first", "second")
    )
