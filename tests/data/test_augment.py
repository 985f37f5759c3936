"""Crop, flip and normalisation, on images small enough to draw."""

import numpy as np

from pipetrgl.data.augment import crop_and_flip, normalise
from pipetrgl.data.order import Draws, epoch_draws

IMAGE = np.array([[[[1, 2], [3, 4]]]], np.uint8)


def draws(top: int, left: int, flip: bool) -> Draws:
    return Draws(np.array([top]), np.array([left]), np.array([flip]))


def test_the_middle_crop_is_the_image() -> None:
    assert np.array_equal(crop_and_flip(IMAGE, draws(1, 1, False), padding=1), IMAGE)


def test_a_corner_crop_brings_in_black_padding() -> None:
    #  0 0 0 0
    #  0 1 2 0     the window at top 0, left 1:  0 0
    #  0 3 4 0                                   1 2
    #  0 0 0 0
    assert crop_and_flip(IMAGE, draws(0, 1, False), padding=1).tolist() == [[[[0, 0], [1, 2]]]]


def test_flip_mirrors_left_to_right() -> None:
    assert crop_and_flip(IMAGE, draws(0, 0, True), padding=0).tolist() == [[[[2, 1], [4, 3]]]]


def test_crop_and_flip_leaves_its_input_alone() -> None:
    image = IMAGE.copy()
    crop_and_flip(image, draws(0, 0, True), padding=0)
    assert np.array_equal(image, IMAGE)


def test_normalise_gives_zero_at_the_mean_and_one_a_deviation_above() -> None:
    image = np.array([[[[51, 102]]]], np.uint8)  # 0.2 and 0.4
    normal = normalise(image, mean=(0.2,), std=(0.2,))
    assert normal.dtype == np.float32
    # one float32 rounding of the scale and one of the product, both of magnitude 2
    np.testing.assert_allclose(normal, [[[[0.0, 1.0]]]], atol=4 * np.finfo(np.float32).eps)


def test_an_image_comes_out_the_same_bits_whatever_its_batch() -> None:
    images = np.random.default_rng(0).integers(256, size=(37, 3, 9, 7), dtype=np.uint8)
    chance = epoch_draws(seed=0, epoch=0, num_samples=37, padding=2, flip=True)

    def prepare(rows: np.ndarray) -> np.ndarray:
        return normalise(crop_and_flip(images[rows], chance.at(rows), 2), (0.1, 0.5, 0.9), (0.3, 0.2, 0.1))

    together = prepare(np.arange(37))
    alone = np.concatenate([prepare(np.array([row])) for row in range(37)])
    assert together.tobytes() == alone.tobytes()
    assert together.flags.c_contiguous
