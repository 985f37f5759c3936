"""Files known by their exact size and, where one is published, their MD5 checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipetrgl.data.dataset import Indices
from pipetrgl.errors import DataError


@dataclass(frozen=True)
class KnownFile:
    """A file as its authors published it; md5 is None where no checksum is known for certain."""

    name: str
    num_bytes: int
    md5: str | None = None


def read_known(folder: Path, file: KnownFile) -> NDArray[np.uint8]:
    """The file's bytes.

    Raises:
        DataError: its size or checksum is another.
    """
    path = folder / file.name
    got = path.stat().st_size
    if got != file.num_bytes:
        raise DataError(f"{path}: got {got} bytes, expected {file.num_bytes}. Unpack or download it again.")
    content = np.fromfile(path, np.uint8)
    if file.md5 is not None:
        check_md5(path, content.data, file.md5)
    return content


def check_md5(path: Path, content: bytes | memoryview, expected: str) -> None:
    """Verifies a checksum; `path` is for the error alone.

    Raises:
        DataError: the content has another one.
    """
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != expected:
        raise DataError(
            f"{path}: the content has MD5 {got}, expected {expected}; it is damaged or not the published file. "
            "Download it again."
        )


def check_classes(folder: Path, files: Sequence[KnownFile], labels: Indices, num_classes: int) -> None:
    """Verifies that every class of a balanced data set has its share of the images.

    Raises:
        DataError: a label is out of range, or the classes are not equally large.
    """
    counts = np.bincount(labels, minlength=num_classes)
    share = len(labels) // num_classes
    wrong = np.flatnonzero(counts != share)
    if len(wrong) or len(counts) > num_classes:
        names = ", ".join(file.name for file in files)
        raise DataError(
            f"{folder}: label {wrong[0]} occurs {counts[wrong[0]]} times in {names}, expected {share} times each of 0 "
            f"to {num_classes - 1}. Download them again."
        )
