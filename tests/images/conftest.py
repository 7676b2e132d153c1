"""Pipelines shared by the tests of images; attached mixtures take themselves out again."""

from __future__ import annotations

import pipes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import loraweave as lw
from loraweave.mixture import Mixture


class Set(NamedTuple):
    """A pipeline, its LoRA files, and a copy with these loaded by diffusers."""

    pipe: Any
    files: dict[str, Path]
    reference: Any


def made(kind: str, folder: Path, *, text: bool) -> Set:
    pipe = pipes.make(kind)
    files = pipes.files(pipe, folder, text=text)
    return Set(pipe, files, pipes.loaded(pipe, files))


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Set]:
    return cache(lambda kind: made(kind, tmp_path_factory.mktemp(kind), text=True))


@pytest.fixture(scope="session")
def textless(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Set]:
    """The same with LoRAs that leave text encoders alone."""
    return cache(lambda kind: made(kind, tmp_path_factory.mktemp(kind), text=False))


@pytest.fixture
def attach() -> Iterator[Callable[..., Mixture]]:
    """``attach(pipe, files, policy)``; detached when the test ends."""
    mixtures: list[Mixture] = []

    def made(*args: Any, **kwargs: Any) -> Mixture:
        mixtures.append(lw.attach(*args, **kwargs))
        return mixtures[-1]

    yield made
    for mixture in mixtures:
        if mixture._attachment is not None:
            mixture.detach()
