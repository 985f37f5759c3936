"""The epoch's order and draws depend on seed, epoch and position alone."""

import numpy as np

from pipetrgl.data.order import epoch_draws, epoch_order


def test_order_visits_every_position_once() -> None:
    assert sorted(epoch_order(seed=0, epoch=3, num_samples=10)) == list(range(10))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(0, 1, 100)
    assert np.array_equal(first, epoch_order(0, 1, 100))
    assert not np.array_equal(first, epoch_order(0, 2, 100))
    assert not np.array_equal(first, epoch_order(1, 1, 100))


def test_draws_keep_to_their_range() -> None:
    draws = epoch_draws(seed=0, epoch=0, num_samples=1000, padding=2, flip=True)
    assert set(draws.top) == set(draws.left) == {0, 1, 2, 3, 4}
    assert 400 < draws.flip.sum() < 600  # six standard deviations about 500


def test_switching_crops_off_leaves_the_flips_as_they_were() -> None:
    both = epoch_draws(seed=0, epoch=0, num_samples=50, padding=4, flip=True)
    flips = epoch_draws(seed=0, epoch=0, num_samples=50, padding=0, flip=True)
    assert np.array_equal(both.flip, flips.flip)
    assert not flips.top.any() and not flips.left.any()
