"""Crop, flip and normalisation of a whole batch at once, each image treated as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipetrgl.data.dataset import Images
from pipetrgl.data.order import Draws


def crop_and_flip(images: Images, draws: Draws, padding: int) -> Images:
    """Pads with black, cuts a window of the old size out of each image, mirrors those that `draws.flip` names.

    Args:
        images: (B, C, H, W).
        draws: (B,) each, corners from 0 to 2 * padding.
        padding: pixels on each side.
    Returns:
        A fresh array of the same shape.
    """
    num_images, channels, height, width = images.shape
    sides = (padding, padding)
    padded = np.pad(images, ((0, 0), (0, 0), sides, sides))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    image, channel = np.arange(num_images)[:, None], np.arange(channels)
    cropped: Images = windows[image, channel, draws.top[:, None], draws.left[:, None]]
    cropped[draws.flip] = cropped[draws.flip, :, :, ::-1]
    return cropped


def normalise(images: Images, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """(x / 255 - mean) / std of each channel, as x * scale + shift in float32.

    Args:
        images: (B, C, H, W).
        mean, std: one value a channel, of pixels scaled to [0, 1].
    """
    scale = 1.0 / (255.0 * np.asarray(std))
    shift = -np.asarray(mean) / np.asarray(std)
    normal = images.astype(np.float32, order="C")
    # One operation at a time, each element alone: an image comes out bit-identical whatever its batch.
    normal *= scale.astype(np.float32)[:, None, None]
    normal += shift.astype(np.float32)[:, None, None]
    return normal
