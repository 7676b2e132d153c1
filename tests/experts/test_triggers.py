"""Warnings of prompts that forget the words which call experts up."""

from __future__ import annotations

import warnings

import pytest

from loraweave.errors import LoraweaveWarning
from loraweave.experts.report import ExpertReport
from loraweave.experts.triggers import warn_of_triggers
from loraweave.experts.types import Expert

HERO = Expert("hero", {}, report=ExpertReport("hero", "single file", triggers=["sks hero", "Red Hair"]))
COAT = Expert("coat", {}, report=ExpertReport("coat", "single file"))


def test_one_of_the_words_in_one_of_the_prompts_is_enough() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_triggers([HERO, COAT, Expert("plain", {})], ["a coat", "an SKS Hero"])
        warn_of_triggers([HERO], ["red hair"])


@pytest.mark.parametrize(("prompts", "where"), [(["a"], "the prompt has none"), (["sks", "hero"], "no prompt has any")])
def test_forgotten_words_are_named(prompts: list[str], where: str) -> None:
    with pytest.warns(LoraweaveWarning) as caught:
        warn_of_triggers([HERO, COAT], prompts)
    said = f"expert 'hero': {where} of the words that call it up (sks hero, Red Hair)"
    assert [str(one.message) for one in caught] == [said]
