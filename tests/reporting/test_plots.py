"""Pictures are written whole, show the right cells, and touch nothing global."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from loraweave.errors import LoraweaveError
from loraweave.reporting.plots import heat_map, heat_maps, short_names, training_curve

EXPERTS = ["qa", "nli", "translate"]


def weights(sites: int, experts: int = 3, seed: int = 0) -> dict[str, list[float]]:
    values = np.random.default_rng(seed).dirichlet(np.ones(experts), sites)
    return {f"model.layers.{n}": row.tolist() for n, row in enumerate(values)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def panels(figure: Figure) -> list[Any]:
    """The axes that are heat maps (the colour bar is not)."""
    return [axes for axes in figure.axes if axes.images]


def test_cells_are_experts_by_sites(tmp_path: Path, drawn: list[Figure]) -> None:
    chosen = {"a.0": [0.0, 0.25, 0.75], "a.1": [0.5, 0.4, 0.1]}
    heat_map(chosen, EXPERTS, tmp_path / "map.png", "Weights")
    (axes,) = panels(drawn[0])
    assert axes.images[0].get_array().tolist() == [[0.0, 0.5], [0.25, 0.4], [0.75, 0.1]]
    assert axes.images[0].get_clim() == (0.0, 0.75)
    assert axes.images[0].get_cmap().name == "viridis"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == EXPERTS
    shown = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert shown[(0, 2)] == "0.75"
    assert shown[(1, 0)] == "0.50"
    assert len(shown) == 6
    assert imread(tmp_path / "map.png").shape[2] in (3, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


def test_large_maps_drop_numbers_and_keep_labels_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"expert_{n:02d}" for n in range(32)]
    heat_map(weights(100, 32), names, tmp_path / "map.png")
    (axes,) = panels(drawn[0])
    assert not axes.texts
    drawn[0].canvas.draw()  # type: ignore[no-untyped-call]
    for labels, side in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda b: (b.x0, b.y0)[side])
        assert len(boxes) >= 25
        for one, other in itertools.pairwise(boxes):
            assert (one.x1 <= other.x0 + 1, one.y1 <= other.y0 + 1)[side]
    height, width, _ = imread(tmp_path / "map.png").shape
    assert width < 3000
    assert height < 2000


def test_negative_weights_get_a_scale_about_nought(tmp_path: Path, drawn: list[Figure]) -> None:
    heat_map({"a": [-0.5, 0.2, 0.1]}, EXPERTS, tmp_path / "map.png")
    (axes,) = panels(drawn[0])
    assert axes.images[0].get_clim() == (-0.5, 0.5)
    assert axes.images[0].get_cmap().name == "RdBu_r"


def test_panels_share_a_scale_and_frame_their_own_expert(tmp_path: Path, drawn: list[Figure]) -> None:
    maps = {"nli": weights(4, seed=1), "held out": weights(4, seed=2), "qa": weights(4, seed=3)}
    heat_maps(maps, EXPERTS, tmp_path / "maps.png", columns=2)
    axes = panels(drawn[0])
    assert [a.get_title() for a in axes] == list(maps)
    largest = max(max(row) for m in maps.values() for row in m.values())
    assert {a.images[0].get_clim() for a in axes} == {(0.0, largest)}
    assert [[patch.get_y() for patch in a.patches] for a in axes] == [[0.5], [], [-0.5]]
    heat_maps(maps, EXPERTS, tmp_path / "maps.png", highest=3.0)
    assert panels(drawn[1])[0].images[0].get_clim() == (0.0, 3.0)


def test_all_weights_nought(tmp_path: Path) -> None:
    heat_map({"a": [0.0, 0.0, 0.0]}, EXPERTS, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_other_formats(tmp_path: Path, ending: str) -> None:
    heat_map(weights(2), EXPERTS, tmp_path / f"map.{ending}")
    start = (tmp_path / f"map.{ending}").read_bytes()[:5]
    assert start == {"pdf": b"%PDF-", "svg": b"<?xml"}[ending]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: heat_map({}, EXPERTS, path), "at least one site and one expert"),
        (lambda path: heat_map({"a": []}, [], path), "at least one site and one expert"),
        (lambda path: heat_map({"a": [1.0, 2.0]}, EXPERTS, path), "site 'a' has 2 weights; expected 3"),
        (lambda path: heat_map({"a": [1.0, 2.0, float("nan")]}, EXPERTS, path), "finite"),
        (lambda path: heat_maps({}, EXPERTS, path), "at least one panel"),
        (lambda path: heat_maps({"x": weights(2), "y": weights(3)}, EXPERTS, path), "'y' has other sites"),
        (lambda path: heat_map(weights(2), EXPERTS, path.with_suffix(".bmp2")), r"ends in \.png"),
        (lambda path: training_curve([], path), "no curve to draw"),
        (lambda path: training_curve([{"step": 1, "train_runtime": 3.0}], path), "no curve to draw"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_file(tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises(LoraweaveError, match=message):
        call(tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0", "model.layers.1"], ["0", "1"]),
        (["encoder.block.0", "decoder.block.0", "decoder.block.1"], ["encoder.0", "decoder.0", "decoder.1"]),
        (["encoder.block.0.layer.0", "encoder.block.0.layer.1"], ["0", "1"]),
        (["m.layers.0", "m.layers.0.mlp", "m.head"], ["layers.0", "layers.0.mlp", "head"]),
        (["network"], ["network"]),
        (["model.network"], ["network"]),
        (["a", "a.b"], ["a", "a.b"]),
        ([], []),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short
    assert len(set(short)) == len(set(names))


def log(sites: int) -> list[dict[str, float]]:
    rows = [
        {
            "step": 10.0 * n,
            "loss": 3.0 / n,
            "balance_loss": 2.0,
            "learning_rate": 0.1,
            "entropy": 1.5,
            **{f"entropy/block.{s}": 1.0 + s for s in range(sites)},
            "load/balance": 0.25,
            "load/qa": 0.75,
        }
        for n in range(1, 6)
    ]
    return [*rows, {"step": 50.0, "eval_loss": 0.5}, {"step": 50.0, "train_runtime": 9.0, "train_loss": 1.7}]


def test_training_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    training_curve(log(3), tmp_path / "curve.png", "training")
    axes = {a.get_ylabel(): a for a in drawn[0].axes}
    assert list(axes) == ["loss", "balance loss", "entropy", "load"]
    lines = {line.get_label(): line for line in axes["loss"].lines}
    assert set(lines) == {"loss", "eval_loss"}
    assert list(lines["loss"].get_xdata()) == [10, 20, 30, 40, 50]
    assert list(lines["loss"].get_ydata()) == [3.0 / n for n in range(1, 6)]
    assert lines["eval_loss"].get_marker() == "o"
    assert [line.get_label() for line in axes["balance loss"].lines] == ["balance_loss"]
    assert [line.get_label() for line in axes["entropy"].lines] == ["block.0", "block.1", "block.2", "entropy, mean"]
    assert [line.get_label() for line in axes["load"].lines] == ["balance", "qa"]
    assert imread(tmp_path / "curve.png").shape[0] > 300


def test_of_many_lines_first_and_last_are_named(tmp_path: Path, drawn: list[Figure]) -> None:
    training_curve(log(14), tmp_path / "curve.png")
    lines = drawn[0].axes[2].lines
    assert len(lines) == 15
    named = [line.get_label() for line in lines if not str(line.get_label()).startswith("_")]
    assert named == ["block.0", "block.13", "entropy, mean"]


def test_only_what_was_logged_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    training_curve([{"step": 1, "loss": 2.0}], tmp_path / "curve.png")
    assert [a.get_ylabel() for a in drawn[0].axes] == ["loss"]


def test_pyplot_and_torch_are_not_needed(tmp_path: Path) -> None:
    code = f"""
import sys
from loraweave.reporting import plots
assert "matplotlib" not in sys.modules
plots.heat_map({{"a": [1.0, 2.0]}}, ["x", "y"], {str(tmp_path / "map.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
