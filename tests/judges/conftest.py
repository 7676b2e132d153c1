"""A judge that listens, and pictures to judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judging_server import COLOURS, KEY, QUICK, Judge, serving
from PIL import Image

from loraweave.evaluation.judges.server import Access, Patience, Server


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("LORAWEAVE_JUDGE_URL", "LORAWEAVE_JUDGE_MODEL", "LORAWEAVE_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as judge:
        yield judge


@pytest.fixture
def connect(served: Judge) -> Callable[..., Server]:
    """Makes a client of the served judge."""

    def make(patience: Patience = QUICK, **options: Any) -> Server:
        return Server(Access(served.url, "model", KEY), patience, **options)

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """``pictures.jsonl`` with two rows of three methods; a method's pictures have its colour."""
    rows = []
    for number, name in enumerate(("hero/coat", "hero/hat")):
        files = {}
        for method, colour in COLOURS.items():
            files[method] = f"{method}-{number}.png"
            Image.new("RGB", (16 + number, 8), colour).save(tmp_path / files[method])
        elements = [{"name": "hero", "features": ["red {hair}", "boots"]}, name.split("/")[1]]
        rows.append({"id": name, "elements": elements, "pictures": files})
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
