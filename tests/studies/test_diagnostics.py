"""The diagnostics on values that can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from pipetrgl.studies.diagnostics import energy_rises, monotone_share, relative_cost, stagnation, straightness


def test_energy_rises_where_loss_and_cost_together_exceed_the_loss_before() -> None:
    #  1.0 -> 0.6 + 0.3 falls; 0.6 -> 0.5 + 0.2 rises by its cost; 0.5 -> 0.4 + 0.1 is equal, which is no rise
    assert energy_rises([1.0, 0.6, 0.5, 0.25], [9.0, 0.3, 0.2, 0.25]) == [False, True, False]
    assert energy_rises([1.0], [0.5]) == []


def test_stagnation_is_what_the_last_head_lacks_to_the_best() -> None:
    assert stagnation([0.5, 0.75, 0.625]) == 0.125
    assert stagnation([0.5, 0.75]) == 0


def test_straightness_of_equal_crossing_and_opposite_steps() -> None:
    right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert straightness([right, right, right]) == 1  # 9 / (3 * 3)
    assert straightness([right, up]) == 0.5  # 2 / (2 * 2)
    assert straightness([right, -right]) == 0
    assert straightness([right, 3 * right]) == 0.8  # straight, but not at constant speed: 16 / (2 * 10)
    assert straightness([0 * right]) is None


def test_monotone_share_counts_pairs() -> None:
    #  0 -> 0, 1 -> 3, 2 -> 1: pairs (0, 1) and (0, 2) keep their order, (1, 2) swaps
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [3.0], [1.0]])
    assert monotone_share(x, y) == pytest.approx(2 / 3)
    assert monotone_share(x, x) == 1
    assert monotone_share(x, -x) == 0
    assert monotone_share(x, torch.ones(3, 1)) == 1  # constant: every product is 0


def test_monotone_share_is_of_whole_rows() -> None:
    x = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    assert monotone_share(x, torch.tensor([[[0.0, 0.0]], [[2.0, -1.0]]])) == 1  # 2 - 1 >= 0
    assert monotone_share(x, torch.tensor([[[0.0, 0.0]], [[1.0, -2.0]]])) == 0


def test_relative_cost_is_in_units_of_the_input() -> None:
    assert relative_cost(torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 1.0]])) == 0.25
    assert relative_cost(torch.zeros(1, 2), torch.ones(1, 2)) is None
