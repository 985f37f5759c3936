"""The order and the augmentation draws of an epoch, pure functions of (seed, epoch, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipetrgl.data.dataset import Indices
from pipetrgl.seeds import numpy_stream


def epoch_order(seed: int, epoch: int, num_samples: int) -> Indices:
    """The permutation of the training split's positions in which this epoch visits them."""
    return numpy_stream(seed, "order", epoch).permutation(num_samples).astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance decides for each image, all of shape (N,).

    Attributes:
        top, left: corner of the crop in the padded image, 0 to 2 * padding.
        flip: mirrored left to right.
    """

    top: Indices
    left: Indices
    flip: NDArray[np.bool_]

    def at(self, positions: Indices) -> Draws:
        return Draws(self.top[positions], self.left[positions], self.flip[positions])


def epoch_draws(seed: int, epoch: int, num_samples: int, padding: int, flip: bool) -> Draws:
    """The draws of a whole epoch, indexed by a sample's position in the training split.

    Crops and flips have a stream each, so switching one off leaves the other as it was.
    """
    corners = numpy_stream(seed, "crop", epoch).integers(2 * padding + 1, size=(2, num_samples))
    flips = numpy_stream(seed, "flip", epoch).integers(2, size=num_samples)
    return Draws(corners[0], corners[1], (flips == 1) & flip)
