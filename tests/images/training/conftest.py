"""Pipelines that are taught; each is made once, gates are fresh for every test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Kind -> pipeline and LoRA files."""
    import image_lessons as lessons

    @cache
    def made(kind: str, text: bool = False) -> Any:
        pipe = lessons.pipeline(kind)
        return pipe, lessons.files(pipe, tmp_path_factory.mktemp(kind), text)

    return made
