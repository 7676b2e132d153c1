"""Invariant 3, second half: a row's output does not depend on its neighbours, nor on how it is padded."""

from __future__ import annotations

from typing import Any

import pytest
from torch.testing import assert_close

import tiny
from methods import METHODS, PROMPT

SIDES = [(name, "right") for name in tiny.EVERY] + [(name, "left") for name in ("t5", "llama", "gpt2", "qwen3")]
ALL = METHODS | PROMPT


@pytest.mark.parametrize(("architecture", "side"), SIDES)
def test_row_does_not_depend_on_its_neighbours(mixed: Any, architecture: str, side: str) -> None:
    inputs = tiny.batch(architecture, (7, 2, 4), side)
    for method in ALL:
        if method in PROMPT and tiny.ARCHITECTURES[architecture].kind != "causal":
            continue
        mixture = mixed(architecture, ALL[method])
        together = tiny.logits(mixture.model, inputs)
        for row in (0, 1, 2):
            alone = tiny.row_of(inputs, row)
            got, expected = tiny.logits(mixture.model, alone)[0], tiny.real_logits(together, inputs, row)
            assert_close(got, expected, atol=5e-6, rtol=1e-5, msg=lambda m, n=method, r=row: f"{n}, row {r}: {m}")


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_rows_in_another_order(mixed: Any, architecture: str) -> None:
    inputs = tiny.batch(architecture)
    turned = {key: value.flip(0) for key, value in inputs.items()}
    for method, policy in METHODS.items():
        mixture = mixed(architecture, policy)
        a, b = tiny.logits(mixture.model, inputs), tiny.logits(mixture.model, turned).flip(0)
        assert_close(a, b, atol=5e-6, rtol=1e-5, msg=lambda m, n=method: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_causal_gates_see_no_later_token(mixed: Any, architecture: str) -> None:
    inputs = tiny.batch(architecture, (8,))
    short = {key: value[:, :5] for key, value in inputs.items()}
    for method in METHODS:
        pooling = getattr(METHODS[method], "pooling", "auto")
        if method == "mole-top1-mean":
            continue  # its choice need not change
        mixture = mixed(architecture, METHODS[method])
        whole, start = tiny.logits(mixture.model, inputs)[:, :5], tiny.logits(mixture.model, short)
        if pooling in ("auto", "token"):
            assert_close(whole, start, atol=5e-6, rtol=1e-5, msg=lambda m, n=method: f"{n}: {m}")
        else:
            assert (whole - start).abs().max() > 1e-4, f"{method} is meant to read the whole sequence"
