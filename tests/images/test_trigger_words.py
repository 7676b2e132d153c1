"""Pipelines called from Python warn of prompts that forget an expert's trigger words."""

from __future__ import annotations

import copy
import inspect
import json
import pipes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import loraweave as lw
from loraweave.cli import main

WORDS = {"hero": "sks hero, Red Hair", "coat": "coat", "ink": None}
ONE_STEP = {**pipes.CALL, "num_inference_steps": 1}


def named(sources: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same LoRAs, with trigger words in their headers."""
    for name, path in sources.items():
        meta = {"modelspec.trigger_phrase": WORDS[name]} if WORDS[name] else None
        save_file(load_file(path), folder / f"{name}.safetensors", metadata=meta)
    return {name: folder / f"{name}.safetensors" for name in sources}


@pytest.fixture
def said() -> Callable[..., list[str]]:
    """What a call warns of: ``said(pipe, prompt, ...)``."""

    def call(pipe: Any, *args: Any, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(*args, **ONE_STEP, **options)
        mine = [one for one in caught if issubclass(one.category, lw.LoraweaveWarning)]
        assert all(one.category is lw.TriggerWarning and one.filename == __file__ for one in mine)
        return [str(one.message) for one in mine]

    return call


HERO = "expert 'hero': the prompt has none of the words that call it up (sks hero, Red Hair)"
COAT = "expert 'coat': the prompt has none of the words that call it up (coat)"


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_each_prompt_warns_once(kind: str, sets: Any, attach: Any, tmp_path: Path, said: Any) -> None:
    pipe, files, _ = sets(kind)
    attach(pipe, named(files, tmp_path), lw.Sum(0.3))
    short = {"max_sequence_length": 12} if kind in ("sd3", "flux") else {}
    assert said(pipe, "a house", **short) == [HERO, COAT]
    assert said(pipe, "a house", **short) == []
    assert said(pipe, "a red house", **short) == [HERO, COAT]
    assert said(pipe, "an SKS Hero", **short) == [COAT]
    assert said(pipe, "red hair and a coat", **short) == []
    assert said(pipe, ["a coat", "sks hero", "sks hero", "a coat"], **short) == [HERO, COAT]
    if kind != "sd15":  # what the text encoders are told is one prompt together
        assert said(pipe, "sks hero on a hill", prompt_2="in a coat", **short) == []


def test_negative_prompts_are_not_asked_and_call_nobody_up(sets: Any, attach: Any, tmp_path: Path, said: Any) -> None:
    pipe, files, _ = sets("sd15")
    attach(pipe, named(files, tmp_path), lw.Sum(0.3))
    assert said(pipe, "sks hero in a coat", negative_prompt="blurry") == []
    assert said(pipe, "sks hero", negative_prompt="a coat") == [COAT]


def test_given_embeddings_are_not_asked(sets: Any, attach: Any, tmp_path: Path, said: Any) -> None:
    pipe, files, _ = sets("sd15")
    attach(pipe, named(files, tmp_path), lw.Composite())
    prompt, negative = pipe.encode_prompt("a house", "cpu", 1, True)
    assert said(pipe, prompt_embeds=prompt, negative_prompt_embeds=negative) == []
    assert said(pipe, prompt_embeds=prompt, negative_prompt="a house") == []


AT_WORK = {
    "sum, one at zero": (lw.Sum(1.0, {"hero": 0.0}), [COAT]),
    "sum, all at zero": (lw.Sum(0.0), []),
    "linear": (lw.Linear({"coat": 1.0, "ink": 1.0}), [COAT]),
    "zero in every part": (lw.Sum(weights={"hero": {"unet": 0.0, "text_encoder": 0.0}}), [COAT]),
    "zero in one part": (lw.Sum(weights={"hero": {"unet": 0.0}}), [HERO, COAT]),
    "schedules": (lw.Sum(weights={"hero": "0@0,1@1", "coat": "0@0,0@1"}), [HERO]),
    "switch": (lw.Switch(every=1), [HERO, COAT]),
    "switch, without one": (lw.Switch(order=["ink", "hero"]), [HERO]),
    "composite": (lw.Composite({"coat": 1.0, "ink": 2.0}), [COAT]),
    "regional": (lw.Regional({"coat": (0, 0, 0.5, 1), "ink": None}), [COAT]),
    "gates": (lw.MoLE(), [HERO, COAT]),
    "learned constants": (lw.CAT(), [HERO, COAT]),
}


@pytest.mark.parametrize("case", AT_WORK)
def test_only_experts_at_work_are_asked_for(case: str, sets: Any, attach: Any, tmp_path: Path, said: Any) -> None:
    pipe, files, _ = sets("sd15")
    policy, expected = AT_WORK[case]
    mixture = attach(pipe, named(files, tmp_path), policy)
    assert said(pipe, "a house") == expected
    for masked, line in (("hero", HERO), ("coat", COAT)):
        with mixture.without(masked):
            assert said(pipe, f"a house without {masked[::-1]}") == [one for one in expected if one != line]


def test_the_pipeline_is_what_it_was_and_other_tasks_warn_too(
    sets: Any, attach: Any, tmp_path: Path, said: Any
) -> None:
    pipe, files, _ = sets("sd15")
    kind, call = type(pipe), type(pipe).__call__
    hooks = [len(pipe.text_encoder._forward_pre_hooks), len(pipe.unet._forward_pre_hooks)]
    mixture = attach(pipe, named(files, tmp_path), lw.Sum(0.3))
    assert type(pipe) is kind is StableDiffusionPipeline
    assert type(pipe).__call__ is call
    assert "__call__" not in vars(pipe)
    assert "prompt" in inspect.signature(pipe.__call__).parameters

    class Mine(StableDiffusionPipeline):
        def __call__(self, text: str, **options: Any) -> Any:  # passes its prompt on under another name
            return super().__call__(f"sks hero {text}", **options)

    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    mine = Mine(**parts, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    with pytest.warns(lw.TriggerWarning) as caught:
        mine("in the hills", **ONE_STEP)
    assert [str(one.message) for one in caught] == [COAT]
    mixture.detach()
    assert said(pipe, "a house") == []
    assert [len(pipe.text_encoder._forward_pre_hooks), len(pipe.unet._forward_pre_hooks)] == hooks


def test_a_warning_made_an_error_leaves_the_mixture_usable(sets: Any, attach: Any, tmp_path: Path, said: Any) -> None:
    pipe, files, _ = sets("sd15")
    attach(pipe, named(files, tmp_path), lw.Switch())
    with warnings.catch_warnings():
        warnings.simplefilter("error", lw.TriggerWarning)
        with pytest.raises(lw.TriggerWarning, match="'hero'"):
            pipe("a house", **ONE_STEP)
    assert said(pipe, "a small house") == [HERO, COAT]


def test_training_says_it_once_of_all_prompts(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, named(files, tmp_path), lw.MoLE())
    pairs = [(Image.new("RGB", (16, 16), "red"), prompt) for prompt in ("a house", "sks hero")]
    with pytest.warns(lw.LoraweaveWarning) as caught:
        lw.train_images(mixture, pairs, lw.Denoising(), steps=2, progress=False)
    assert [str(one.message) for one in caught] == [COAT.replace("the prompt has none", "no prompt has any")]
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("always::loraweave.errors.TriggerWarning")
def test_the_command_line_says_it_once(sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, files, _ = sets("sd15")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(tmp_path / "base")
    experts = {name: str(path) for name, path in named(files, tmp_path).items()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"base": "base", "experts": experts, "method": {"name": "sum"}}))
    size = ["--size", "16", "16", "--steps", "1", "--seed", "0", "1"]
    assert main(["image", str(recipe), "--prompt", "a house", *size, "-o", str(tmp_path / "out")]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "call it up" in line] == [
        f"warning: {HERO}", f"warning: {COAT}",
    ]  # fmt: skip
