"""CIFAR-10 and CIFAR-100 in their binary version: records of label bytes and 3 x 32 x 32 pixels, rows first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import ArraySamples, Collection
from pipetrgl.data.places import find
from pipetrgl.data.verified import KnownFile, check_classes, read_known

_NUM_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarFiles:
    """One of the two data sets.

    Attributes:
        label_bytes: of each record; the last of them is the class, an earlier one CIFAR-100's coarse class.
    """

    folder: str
    archive: str
    train: tuple[KnownFile, ...]
    test: tuple[KnownFile, ...]
    label_bytes: int
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = CifarFiles(
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train=(
        KnownFile("data_batch_1.bin", 30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        KnownFile("data_batch_2.bin", 30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
        KnownFile("data_batch_3.bin", 30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        KnownFile("data_batch_4.bin", 30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        KnownFile("data_batch_5.bin", 30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
    ),
    test=(KnownFile("test_batch.bin", 30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),),
    label_bytes=1,
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = CifarFiles(
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train=(KnownFile("train.bin", 153_700_000),),
    test=(KnownFile("test.bin", 30_740_000),),
    label_bytes=2,
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar(config: DataConfig, environ: Mapping[str, str], files: CifarFiles) -> Collection:
    """50,000 + 10,000 images of 32 x 32.

    Verified are the size of every file, that every class is equally large and, for CIFAR-10, each file's MD5. The
    authors publish checksums of the archives alone; those of CIFAR-10's files agree in several projects.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    folder = find(
        config,
        environ,
        inner=(files.folder,),
        files=[file.name for file in (*files.train, *files.test)],
        advice=f"Get {files.archive} (the binary version) from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it.",
    )
    return Collection(
        train=_split(folder, files.train, files),
        test=_split(folder, files.test, files),
        image_shape=(3, 32, 32),
        num_classes=files.num_classes,
        mean=files.mean,
        std=files.std,
    )


def _split(folder: Path, split: tuple[KnownFile, ...], files: CifarFiles) -> ArraySamples:
    content = np.concatenate([read_known(folder, file) for file in split])
    records = content.reshape(-1, files.label_bytes + _NUM_PIXELS)
    labels = records[:, files.label_bytes - 1].astype(np.int64)
    check_classes(folder, split, labels, files.num_classes)
    return ArraySamples(records[:, files.label_bytes :].reshape(-1, 3, 32, 32), labels)
