"""The benchmark of image compositions at its smallest: cells, tables and a sheet; nothing is made twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from images import run
from loraweave.zoo import images


@pytest.mark.slow
def test_it_paints_scores_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "STEPS", 2)
    monkeypatch.setattr(run, "SIZES", (2, 3))
    small = ["--methods", "nla", "mole", "--seeds", "0", "1", "--compositions", "1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", "-o", str(tmp_path), *small])
    run.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["summary"]) == ["nla", "mole"]
    assert set(results["summary"]["nla"]["2"]) == {"text", "image", "distinct"}
    value, low, high = results["differences"]["mole - nla"]["text"]
    assert low <= value <= high
    assert Image.open(tmp_path / "sheet.png").height > 2 * 96
    cell = tmp_path / "cells" / "nla-0.json"
    rows = json.loads(cell.read_text())["rows"]
    assert results["summary"]["nla"]["3"]["text"][0] == pytest.approx(
        sum(json.loads((tmp_path / "cells" / f"nla-{s}.json").read_text())["rows"][1]["text"] for s in (0, 1)) / 2,
        abs=1e-4,
    )
    assert [row["size"] for row in rows] == [2, 3]
    before = cell.stat().st_mtime_ns
    run.main()
    assert cell.stat().st_mtime_ns == before
