"""STL-10 in its binary files: 3 x 96 x 96 pixels, columns first, with labels from 1 in files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import ArraySamples, Collection
from pipetrgl.data.places import find
from pipetrgl.data.verified import KnownFile, check_classes, read_known


@dataclass(frozen=True)
class StlFiles:
    """The labelled splits, each as images and labels."""

    train: tuple[KnownFile, KnownFile]
    test: tuple[KnownFile, KnownFile]


STL10 = StlFiles(
    train=(
        KnownFile("train_X.bin", 138_240_000, "918c2871b30a85fa023e0c44e0bee87f"),
        KnownFile("train_y.bin", 5_000, "5a34089d4802c674881badbb80307741"),
    ),
    test=(
        KnownFile("test_X.bin", 221_184_000, "7f263ba9f9e0b06b93213547f721ac82"),
        KnownFile("test_y.bin", 8_000, "36f9794fa4beb8a2c72628de14fa638e"),
    ),
)


def stl10(config: DataConfig, environ: Mapping[str, str], files: StlFiles = STL10) -> Collection:
    """5,000 + 8,000 images of 96 x 96; the unlabelled ones and the folds are not read.

    Verified are the size and MD5 of every file (as torchvision lists them) and that the classes are equally large.

    Source: https://cs.stanford.edu/~acoates/stl10/
    """
    folder = find(
        config,
        environ,
        inner=("stl10_binary",),
        files=[file.name for file in (*files.train, *files.test)],
        advice="Get stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10/, unpack it.",
    )
    return Collection(
        train=_split(folder, files.train),
        test=_split(folder, files.test),
        image_shape=(3, 96, 96),
        num_classes=10,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
    )


def _split(folder: Path, split: tuple[KnownFile, KnownFile]) -> ArraySamples:
    images, labels = (read_known(folder, file) for file in split)
    # A label of 0 wraps round to 255, which is out of range like any other wrong one.
    classes = (labels - np.uint8(1)).astype(np.int64)
    check_classes(folder, split[1:], classes, num_classes=10)
    return ArraySamples(images.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2), classes)
