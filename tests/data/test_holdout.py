"""The validation split and the balanced subset, class by class."""

import numpy as np
import pytest

from pipetrgl.data.holdout import hold_out, keep_balanced
from pipetrgl.errors import DataError
from pipetrgl.seeds import numpy_stream

LABELS = np.repeat(np.array([0, 1, 2], np.int64), [40, 20, 10])


def test_validation_split_is_stratified_and_disjoint() -> None:
    train, valid = hold_out(LABELS, 0.1, numpy_stream(0, "validation"))
    assert np.bincount(LABELS[valid]).tolist() == [4, 2, 1]
    assert sorted([*train, *valid]) == list(range(70))


def test_what_rounding_leaves_over_goes_to_the_largest_remainders() -> None:
    # 0.16 * (40, 20, 10) = 6.4, 3.2, 1.6: 10 of round(11.2) = 11 after rounding down, the last one to class 2.
    _, valid = hold_out(LABELS, 0.16, numpy_stream(0, "validation"))
    assert np.bincount(LABELS[valid]).tolist() == [6, 3, 2]


def test_validation_split_is_fixed_by_the_seed() -> None:
    first, again, other = (hold_out(LABELS, 0.3, numpy_stream(seed, "validation"))[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fraction_zero_holds_nothing_out() -> None:
    train, valid = hold_out(LABELS, 0.0, numpy_stream(0, "validation"))
    assert len(train) == 70 and len(valid) == 0


def test_a_class_is_never_emptied() -> None:
    with pytest.raises(DataError, match="leaves no training image of class 1, which has 1"):
        hold_out(np.array([0, 0, 0, 0, 1]), 0.9, numpy_stream(0, "validation"))


def test_subset_takes_the_classes_in_turn() -> None:
    kept = keep_balanced(LABELS, 14, numpy_stream(0, "num_train"))
    assert np.bincount(LABELS[kept]).tolist() == [5, 5, 4]
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_a_class_that_runs_out_is_passed_over() -> None:
    kept = keep_balanced(LABELS, 40, numpy_stream(0, "num_train"))
    assert np.bincount(LABELS[kept]).tolist() == [15, 15, 10]


@pytest.mark.parametrize("num_kept", [2, 71])
def test_subset_that_cannot_be_had_is_an_error(num_kept: int) -> None:
    with pytest.raises(DataError, match=f"num_train: {num_kept} is not allowed.*3 classes; allowed: 3 to 70"):
        keep_balanced(LABELS, num_kept, numpy_stream(0, "num_train"))
