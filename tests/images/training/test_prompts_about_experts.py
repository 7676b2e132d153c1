"""Prompts that are about some of the experts: taught under their mask, and judged by their concepts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_lessons as lessons
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.testing import assert_close

import loraweave as lw
from loraweave.integrations import diffusers_training as runs
from loraweave.mixing.numerics import balance_loss
from loraweave.recipe.images import Images
from loraweave.recipe.parts import Train
from loraweave.training import objective as gates
from loraweave.training.images import train as training
from loraweave.training.images.objectives import Draw

CPU = torch.device("cpu")
PAIRS = [("hero coat", ["hero", "coat"]), ("ink hero", ["hero"]), "coat", ("coat ink", ("coat",))]
WEIGHT = 0.3


def gradients(mixture: lw.Mixture) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in mixture.gate_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_a_step_is_the_mean_of_its_rows_each_under_its_own_mask(
    taught: Any, attach: Any, kind: str, checkpointing: bool
) -> None:
    pipe, files = taught(kind)
    mixture = attach(pipe, files, lw.MoLE(activation="sigmoid"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in mixture.gate_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    objective = lessons.guidance(call=lessons.EXTRA[kind], local_weight=0.7)
    draws = [Draw(5, 9, 1), Draw(6, 9, 0), Draw(7, 9, 2), Draw(8, 9, 3)]

    losses: list[float] = []
    balances: list[float] = []
    with runs.prepared(pipe, False):
        plain: Any = objective.lesson(mixture, [item if isinstance(item, str) else item[0] for item in PAIRS], CPU)
        concepts = dict(plain.concepts)
        # Two rows are about all there are, said or not.
        for names, rows in (("hero", "coat"), [0, 2]), (("hero",), [1]), (("coat",), [3]):
            plain.concepts = {name: concepts[name] for name in names}
            group = [draw for draw in draws if draw.item in rows]
            with mixture.only(*names):
                loss = plain.loss(group)
                shares = torch.stack([gates.site_shares(site) for site in mixture.sites]).mean(0)
                balance = balance_loss(shares[[mixture.experts.index(name) for name in names]])
                (len(group) / len(draws) * (loss + WEIGHT * balance)).backward()
            losses += len(group) * [float(loss)]
            balances += len(group) * [float(balance)]
        expected = gradients(mixture)
    for _, parameter in mixture.gate_parameters():
        parameter.grad = None
    with runs.prepared(pipe, checkpointing):
        lesson = objective.lesson(mixture, PAIRS, CPU)
        _, told = training._teach(mixture, lesson, draws, draws, WEIGHT, Accelerator(cpu=True))
    assert told["task_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert told["balance_loss"] == pytest.approx(sum(balances) / len(balances), rel=1e-5)
    found = gradients(mixture)
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-3)
    assert mixture.kept == mixture.experts


def test_samples_are_painted_by_those_the_prompt_is_about(taught: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE(activation="sigmoid"))
    lessons.train(mixture, [("ink hero", ["hero"])], steps=1, output_dir=tmp_path, sample_every=1)
    with Image.open(tmp_path / "samples" / "step-000001.png") as opened:
        sample = np.array(opened)
    call = lessons.SIZE | {"num_inference_steps": 2, "guidance_scale": 2.0}

    def paint() -> Any:
        return np.array(pipe("ink hero", generator=torch.Generator().manual_seed(0), **call).images[0])

    with mixture.only("hero"):
        assert np.array_equal(paint(), sample)
    assert not np.array_equal(paint(), sample)


def test_runs_go_on_only_with_the_same_experts_at_work(taught: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE(activation="sigmoid"))
    lessons.train(mixture, [("hero", ["hero"]), "coat"], output_dir=tmp_path)
    with pytest.raises(lw.LoraweaveError, match="this run had prompts="):
        lessons.train(mixture, [("hero", ["coat"]), "coat"], output_dir=tmp_path, resume=True)


def test_runs_go_on_only_with_the_same_policy_and_experts(taught: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    lessons.train(mixture, ["coat"], output_dir=tmp_path)
    mixture.policy = lw.MoLE(scale=2.0)
    with pytest.raises(lw.LoraweaveError, match=r"this run had policy\.scale=1\.0, got 2\.0"):
        lessons.train(mixture, ["coat"], output_dir=tmp_path, resume=True)
    mixture.detach()
    names = list(files)
    other = attach(pipe, files | {names[0]: files[names[1]]}, lw.MoLE())
    with pytest.raises(lw.LoraweaveError, match=rf"this run had experts\.{names[0]}="):
        lessons.train(other, ["coat"], output_dir=tmp_path, resume=True)


def test_one_expert_under_gates_that_share_out_a_total(taught: Any, attach: Any) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    with pytest.raises(lw.LoraweaveError, match=r"'a hero' is about one expert; .* nothing to learn, and no prompt"):
        lessons.train(mixture, [("a hero", ["hero"])])
    with pytest.warns(UserWarning, match=r"nothing to learn from it \(1 such of 2\)"):
        lessons.train(mixture, [("a hero", ["hero"]), "coat"], steps=1)
    mixture.policy = lw.MoLE(activation="sigmoid")
    done = lessons.train(mixture, [("a hero", ["hero"])], steps=1)
    assert done.history[0]["gradient"] > 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("hero", ["heor"]), "prompts: unknown expert 'heor'; did you mean 'hero'"),
        (("hero", []), r"expected a text, or a pair of a text and the names of some experts, got \('hero', \[\]\)"),
        (("hero", "hero"), "a pair of a text and the names"),
        ((5, ["hero"]), "a pair of a text and the names"),
        ((" ", ["hero"]), "none of them blank"),
    ],
)
def test_bad_pairs(taught: Any, attach: Any, item: Any, message: str) -> None:
    pipe, files = taught("sd15")
    with pytest.raises(lw.LoraweaveError, match=message):
        lessons.train(attach(pipe, files, lw.MoLE()), [item])


def test_recipes_say_it_too() -> None:
    content = {"objective": "clip", "clip": "c", "prompts": ["a", {"text": "b", "experts": ["hero"]}]}
    section = Images.model_validate(content)
    section.check(["hero", "coat"], Train(), data=False)
    assert section.lesson()[0] == ["a", ("b", ("hero",))]
    with pytest.raises(lw.LoraweaveError, match=r"images\.prompts: unknown expert 'hero'"):
        section.check(["coat"], Train(), data=False)


def test_a_clip_in_half_precision_reads_as_ever_under_autocast() -> None:
    clip = lessons.clip()
    clip.model.half()
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = clip.pictures(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(clip.pictures(pictures), expected)
