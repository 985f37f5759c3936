"""The embedded part of Fashion-MNIST: 6,000 + 1,000 images, as many of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipetrgl.data.dataset import ArraySamples, Collection
from pipetrgl.data.idx import FASHION_MEAN, FASHION_STD

PATH = Path(__file__).with_name("fashion_mnist_mini.npz")


def fashion_mnist_mini() -> Collection:
    """The first 600 training and 100 test images of each class, in stored order.

    Made by tools/make_fashion_mnist_mini.py from Debian's package dataset-fashion-mnist.

    Source: arXiv 1708.07747, MIT; see fashion_mnist_mini.LICENSE.
    """
    with np.load(PATH, allow_pickle=False) as file:
        splits = [
            ArraySamples(file[f"{split}_images"][:, None], file[f"{split}_labels"].astype(np.int64))
            for split in ("train", "test")
        ]
    return Collection(splits[0], splits[1], (1, 28, 28), 10, FASHION_MEAN, FASHION_STD)
