"""Student's t and the intervals made of it, against tables and by hand."""

from __future__ import annotations

import math

import pytest

from pipetrgl.studies.intervals import interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "table"),
    # two-sided 95 %, as printed in any table; 1 and 2 degrees of freedom have closed forms
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (19, 2.0930), (30, 2.0423),
     (120, 1.9799), (100_000, 1.9600)],
)  # fmt: skip
def test_t_is_that_of_the_tables(freedom: int, table: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(table, abs=5.1e-5)


def test_t_at_other_levels_and_in_closed_form() -> None:
    assert t_quantile(0.99, 9) == pytest.approx(3.2498, abs=5e-5)
    assert t_quantile(0.5, 4) == pytest.approx(0.7407, abs=5e-5)
    assert t_quantile(0.95, 1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-9)
    assert t_quantile(0.95, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-9)


def test_an_interval_by_hand() -> None:
    #  mean 2, deviations -1 0 1, s = 1: 4.3027 / sqrt(3) = 2.4841
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    assert found.holds_zero  # -0.48 to 4.48
    assert not interval([2.0, 3.0, 4.0]).holds_zero  # 0.52 to 5.48


def test_one_value_has_no_interval_and_equal_ones_a_point() -> None:
    assert (interval([0.5]).half, interval([0.5]).low, interval([0.5]).holds_zero) == (None, None, None)
    assert interval([0.0, 0.0]).holds_zero
    assert interval([0.25, 0.25]).holds_zero is False
