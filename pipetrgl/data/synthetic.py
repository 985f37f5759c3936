"""Synthetic images: a coarse pattern of each class under noise, of any shape, made from the seed alone."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import Collection, Images, Indices
from pipetrgl.errors import DataError
from pipetrgl.seeds import numpy_stream

_GRID = 4
_CONTRAST = 40.0
_NOISE = 60.0
_NUM_WINDOWS = 1 << 16


class SyntheticSamples:
    """Images made when read: image i = 128 + pattern of its class + a window of one long noise vector.

    The window's start is drawn for each image, so an image is the same whenever it is read and costs one gather.
    """

    def __init__(self, patterns: NDArray[np.int16], noise: NDArray[np.int16], labels: Indices, starts: Indices) -> None:
        self.labels = labels
        self._patterns = patterns
        self._windows = sliding_window_view(noise, int(np.prod(patterns.shape[1:])))
        self._starts = starts

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> Images:
        images = self._patterns[self.labels[indices]]
        images += self._windows[self._starts[indices]].reshape(images.shape)
        return images.clip(0, 255).astype(np.uint8)


def synthetic(config: DataConfig, seed: int) -> Collection:
    """`config.samples` training images and an eighth as many test images, as many of each class as can be.

    Raises:
        DataError: fewer training images than classes.
    """
    if config.samples < config.num_classes:
        raise DataError(
            f"data.samples: {config.samples} images cannot show {config.num_classes} classes; allowed: "
            f"at least data.num_classes."
        )
    patterns = _patterns(config.shape, config.num_classes, numpy_stream(seed, "synthetic", "patterns"))
    length = int(np.prod(config.shape)) + _NUM_WINDOWS - 1
    noise = (_NOISE * numpy_stream(seed, "synthetic", "noise").standard_normal(length)).astype(np.int16)

    def samples(split: str, num_samples: int) -> SyntheticSamples:
        stream = numpy_stream(seed, "synthetic", split)
        labels = stream.permutation(np.arange(num_samples, dtype=np.int64) % config.num_classes)
        return SyntheticSamples(patterns, noise, labels, stream.integers(_NUM_WINDOWS, size=num_samples))

    channels = config.shape[0]
    return Collection(
        train=samples("train", config.samples),
        test=samples("test", config.samples // 8),
        image_shape=config.shape,
        num_classes=config.num_classes,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def _patterns(shape: tuple[int, int, int], num_classes: int, stream: np.random.Generator) -> NDArray[np.int16]:
    """(num_classes, C, H, W): a 4 x 4 grid of random grey levels for each class and channel, blown up to the image."""
    channels, height, width = shape
    coarse = 128.0 + _CONTRAST * stream.standard_normal((num_classes, channels, _GRID, _GRID))
    rows = np.arange(height) * _GRID // height
    columns = np.arange(width) * _GRID // width
    return coarse[:, :, rows[:, None], columns].astype(np.int16)
