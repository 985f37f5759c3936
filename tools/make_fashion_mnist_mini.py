"""Writes the embedded part of Fashion-MNIST from the files of Debian's package dataset-fashion-mnist.

    python tools/make_fashion_mnist_mini.py [SOURCE] [TARGET]

Keeps the first 600 training and 100 test images of each class, in stored order. The bytes are the same every time: the
archive holds no date, and LZMA's output depends on its input alone.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipetrgl.data import mini
from pipetrgl.data.idx import read_split

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SPLITS = (("train", "train", 600), ("test", "t10k", 100))


def first_of_each_class(labels: NDArray[np.int64], num_each: int) -> NDArray[np.intp]:
    """Ascending indices of the first `num_each` images of every class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:num_each] for label in np.unique(labels)]))


def make(source: Path, target: Path) -> None:
    """Reads the four IDX files in `source`, writes the archive `target`."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
        for split, prefix, num_each in SPLITS:
            samples = read_split(source, f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
            kept = first_of_each_class(samples.labels, num_each)
            _write(archive, f"{split}_images", samples.images[kept, 0])
            _write(archive, f"{split}_labels", samples.labels[kept].astype(np.uint8))


def _write(archive: zipfile.ZipFile, name: str, array: NDArray[np.uint8]) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_LZMA
    entry.create_system = 3  # Unix, whatever the machine
    archive.writestr(entry, content.getvalue())


if __name__ == "__main__":
    make(
        Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE,
        Path(sys.argv[2]) if len(sys.argv) > 2 else mini.PATH,
    )
