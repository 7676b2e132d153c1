"""The benchmark of image compositions at its smallest: cells, tables and a sheet; nothing is made twice."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import loraweave as lw
from images import run
from loraweave.evaluation.compositions import CompositionJudge
from loraweave.zoo import images


def test_casts_and_compositions() -> None:
    assert len({run.cast(seed) for seed in range(71)} | {run.TRIED}) == 72
    for seed in range(20):
        names = run.cast(seed)
        layers = [images.HELD_OUT[name].layer for name in names]
        assert len(set(layers)) == 6
        assert "character" in layers
        made = run.composed(names, seed)
        assert [len(one.loras) for one in made] == [2] * 5 + [3] * 10 + [4] * 10 + [5] * 5 + [6]
        assert len({one.loras for one in made}) == 31
        assert all(images.HELD_OUT[name].words in one.prompt for one in made for name in one.loras)
        for name in names:
            others = [e.words for e in images.HELD_OUT.values() if e is not images.HELD_OUT[name]]
            assert images.HELD_OUT[name].words in run.told_alone(name, seed)
            assert not any(words in run.told_alone(name, seed) for words in others)


@pytest.mark.slow
def test_fusion_paints_with_the_composition_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell holds what the library fuses of the cast, and the pipeline is bare again."""
    for name, value in (("FUSING_STEPS", 1), ("SIZES", (6,))):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(images, "STEPS", 2)
    loras = run.cast(0)
    made = run.cell("fused", 0, argparse.Namespace(out=tmp_path, noises=1), None, CompositionJudge())
    assert (made["training"], len(made["rows"])) == (None, 1)
    pipe: Any = images.pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": images.GUIDANCE}

    def paint() -> bytes:
        (one,) = run.composed(loras, 0)
        drawn: bytes = pipe(one.prompt, generator=torch.Generator().manual_seed(0), **call).images[0].tobytes()
        return drawn

    bare = paint()
    with run.composing(pipe, run.fusion(pipe, loras, 0), loras[:2]):
        pass
    assert paint() == bare
    prompts = {name: run.told_alone(name, 0) for name in loras}
    fused = lw.fuse(pipe, images.loras(loras), prompts, call=call | {"num_inference_steps": 1}, progress=False)
    mixture = lw.attach(pipe, {"fused": fused}, lw.Sum())
    assert paint() == Image.open(tmp_path / "pictures" / "fused" / "0-0-0.png").tobytes() != bare
    mixture.detach()


@pytest.mark.slow
def test_it_paints_scores_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "STEPS", 2)
    monkeypatch.setattr(run, "SIZES", (5, 6))
    small = ["--methods", "nla", "mole", "--seeds", "0", "1", "--noises", "1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", "-o", str(tmp_path), *small])
    run.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["summary"]) == ["nla", "mole"]
    assert set(results["summary"]["nla"]["5"]) == {"text", "image", "distinct"}
    value, low, high = results["differences"]["mole - nla"]["text"]
    assert low <= value <= high
    assert Image.open(tmp_path / "sheet.png").height > 2 * 96
    cell = tmp_path / "cells" / "nla-0.json"
    rows = json.loads(cell.read_text())["rows"]
    assert results["summary"]["nla"]["6"]["text"][0] == pytest.approx(
        sum(json.loads((tmp_path / "cells" / f"nla-{s}.json").read_text())["rows"][-1]["text"] for s in (0, 1)) / 2,
        abs=1e-4,
    )
    assert [row["size"] for row in rows] == [5, 5, 5, 5, 5, 6]
    before = cell.stat().st_mtime_ns
    run.main()
    assert cell.stat().st_mtime_ns == before
