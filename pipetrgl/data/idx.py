"""IDX files, the format of MNIST and of the data sets made after it, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import ArraySamples, Collection
from pipetrgl.data.places import find
from pipetrgl.data.verified import check_md5
from pipetrgl.errors import DataError

_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_SUFFIXES = ("", ".gz")
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_UNKNOWN: Mapping[str, str] = MappingProxyType({})
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)


def fashion_mnist(config: DataConfig, environ: Mapping[str, str], usual: tuple[Path, ...] = (_DEBIAN,)) -> Collection:
    """Fashion-MNIST, 60,000 + 10,000 images of 28 x 28; size and MD5 of every unzipped file are verified.

    Source: arXiv 1708.07747; mean and standard deviation of its training pixels. The authors publish checksums of the
    gzipped files; those of the unzipped ones agree in several projects and with Debian's package.
    """
    folder = find(
        config,
        environ,
        inner=("fashion-mnist", "FashionMNIST/raw"),
        files=(*_TRAIN, *_TEST),
        advice="Install it: apt-get install dataset-fashion-mnist.",
        usual=usual,
        suffixes=_SUFFIXES,
    )
    train, test = read_split(folder, *_TRAIN, _FASHION_MD5), read_split(folder, *_TEST, _FASHION_MD5)
    return _collection(folder, train, test, FASHION_MEAN, FASHION_STD)


def mnist_idx(config: DataConfig, environ: Mapping[str, str]) -> Collection:
    """Any data set in MNIST's four files; MNIST's own mean and standard deviation; sizes are verified."""
    folder = find(
        config,
        environ,
        inner=("mnist", "MNIST/raw"),
        files=(*_TRAIN, *_TEST),
        advice="Get MNIST's four IDX files, plain or gzipped.",
        suffixes=_SUFFIXES,
    )
    return _collection(folder, read_split(folder, *_TRAIN), read_split(folder, *_TEST), (0.1307,), (0.3081,))


def read_split(folder: Path, images_name: str, labels_name: str, md5: Mapping[str, str] = _UNKNOWN) -> ArraySamples:
    """Images (N, 1, H, W) and labels (N,) of one split, with the checksums of those files that `md5` names.

    Raises:
        DataError: damaged files, or not as many labels as images.
    """
    images, labels = (
        read_idx(folder / name, num_axes, md5.get(name)) for name, num_axes in ((images_name, 3), (labels_name, 1))
    )
    if len(images) != len(labels):
        raise DataError(f"{folder}: {images_name} holds {len(images)} images, {labels_name} {len(labels)} labels.")
    return ArraySamples(images[:, None], labels.astype(np.int64))


def read_idx(path: Path, num_axes: int, md5: str | None = None) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file; falls back on path.gz where the plain file is absent.

    The file is 00 00 08 num_axes, each axis' length as a big-endian 32-bit integer, then the bytes.

    Raises:
        DataError: not such a file, shorter or longer than its head says, or of another checksum once unzipped.
    """
    path = path if path.exists() else path.with_name(path.name + ".gz")
    content = _content(path)
    if content[:4] != bytes((0, 0, 8, num_axes)):
        raise DataError(
            f"{path}: starts with {content[:4].hex(' ') or 'nothing'}, expected 00 00 08 {num_axes:02x}; not an IDX "
            f"file of bytes with {num_axes} axes. Download it again."
        )
    head = 4 + 4 * num_axes
    shape = tuple(int(length) for length in np.frombuffer(content[4:head].ljust(head - 4, b"\0"), ">u4"))
    expected = head + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path}: got {len(content)} bytes, expected {expected} for shape {shape}. Download it again.")
    if md5 is not None:
        check_md5(path, content, md5)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Download it again.") from error


def _collection(
    folder: Path, train: ArraySamples, test: ArraySamples, mean: tuple[float, ...], std: tuple[float, ...]
) -> Collection:
    if len(train) == 0:
        raise DataError(f"{folder}: {_TRAIN[0]} holds no image.")
    num_classes = int(train.labels.max()) + 1
    if len(test) and (train.images.shape[1:] != test.images.shape[1:] or test.labels.max() >= num_classes):
        raise DataError(
            f"{folder}: the test split has images {test.images.shape[1:]} and classes up to {test.labels.max()}, the "
            f"training split {train.images.shape[1:]} and up to {num_classes - 1}; they do not belong together."
        )
    _, channels, height, width = train.images.shape
    return Collection(train, test, (channels, height, width), num_classes, mean, std)
