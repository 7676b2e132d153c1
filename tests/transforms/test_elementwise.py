"""The pieces of TIES and DARE: by hand, by loops, and beside peft's own functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import slow_elect, slow_ties, slow_trim
from peft.utils import merge_utils
from torch.testing import assert_close

from loraweave.transforms.elementwise import combine, disjoint_mean, drop, trim


def matrices(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 5, generator=random) for _ in range(count)]


def nothing_drawn(_: int) -> torch.Generator:
    raise AssertionError("this method draws nothing")


def test_a_worked_example_of_ties() -> None:
    """Density 1/2 keeps two of four numbers each; signs by sum: +, -, nobody, +."""
    first, second = torch.tensor([[4.0, -3.0, 1.0, 0.5]]), torch.tensor([[-1.0, -5.0, 0.1, 2.0]])
    merged = combine("ties", [first, second], [1.0, 1.0], 0.5, nothing_drawn)
    assert_close(merged, torch.tensor([[4.0, -4.0, 0.0, 2.0]]))
    # Weight -1 turns the second before the vote: at the second number the sum is -3 + 5.
    turned = combine("ties", [first, second], [1.0, -1.0], 0.5, nothing_drawn)
    assert_close(turned, torch.tensor([[4.0, 5.0, 0.0, -2.0]]))


def test_an_exact_draw_elects_nobody() -> None:
    assert_close(disjoint_mean(torch.tensor([[2.0, 1.0], [-2.0, 3.0]])), torch.tensor([0.0, 2.0]))


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.integers(1, 4))
def test_loops(seed: int, density: float, count: int) -> None:
    given_ = [m.double() for m in matrices(count, seed)]
    weights = [1.0, -0.5, 2.0, 0.3][:count]
    assert_close(trim(given_[0], density), slow_trim(given_[0], density))
    assert_close(disjoint_mean(torch.stack(given_)), slow_elect(given_))
    assert_close(combine("ties", given_, weights, density, nothing_drawn), slow_ties(given_, weights, density))
    pruned = sum(w * slow_trim(m, density) for w, m in zip(weights, given_, strict=True))
    assert_close(combine("magnitude_prune", given_, weights, density, nothing_drawn), pruned)


def test_density_is_not_lost_to_rounding() -> None:
    assert int((trim(torch.rand(100) + 1, 0.29) != 0).sum()) == 29
    assert int((trim(torch.rand(3) + 1, 0.01) != 0).sum()) == 1
    assert trim(torch.zeros(0, 4), 0.5).shape == (0, 4)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, -1.3]])
def test_peft_computes_the_same(density: float, weights: list[float]) -> None:
    tensors, vector = matrices(), torch.tensor(weights)
    expected = merge_utils.magnitude_prune(tensors, vector, density)
    assert_close(combine("magnitude_prune", tensors, weights, density, nothing_drawn), expected)
    torch.manual_seed(5)
    expected = merge_utils.dare_linear(tensors, vector, density)
    shared = torch.Generator().manual_seed(5)  # peft draws for one tensor after the other
    assert_close(combine("dare_linear", tensors, weights, density, lambda _: shared), expected)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_peft_votes_the_same_where_weights_are_equal(density: float) -> None:
    tensors, weights = matrices(), [0.7] * 3
    expected = merge_utils.ties(tensors, torch.tensor(weights), density)
    assert_close(combine("ties", tensors, weights, density, nothing_drawn), expected)
    torch.manual_seed(5)
    expected = merge_utils.dare_ties(tensors, torch.tensor(weights), density)
    shared = torch.Generator().manual_seed(5)
    assert_close(combine("dare_ties", tensors, weights, density, lambda _: shared), expected)


def test_dropping_keeps_the_expectation() -> None:
    ones = torch.ones(200, 200)
    dropped = drop(ones, 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert abs(float(dropped.mean()) - 1.0) < 0.02  # 3 standard deviations are 0.026
    assert_close(drop(ones, 1.0, torch.Generator()), ones)
