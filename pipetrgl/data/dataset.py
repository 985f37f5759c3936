"""A data set: its specification, its channel statistics, its three splits of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]
_TUPLES = ("sample_shape", "mean", "std")


@dataclass(frozen=True)
class DataSpec:
    """What every worker must know of the data, though only stage 0 reads it.

    Attributes:
        sample_shape: (C, H, W) of an image, (T,) of a row of text, whose target is a class for each of its T tokens.
        mean, std: of each channel, of pixels scaled to [0, 1]: what images are normalised with; published constants,
            not computed here; unused for text.
    """

    name: str
    num_train: int
    num_valid: int
    num_test: int
    sample_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def samples(self) -> str:
        """What they are, in words."""
        return "rows of text" if self.name == "text" else "images"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON."""
        lists = {name: list(getattr(self, name)) for name in _TUPLES}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSpec:
        return cls(**{**values, **{name: tuple(values[name]) for name in _TUPLES}})


class Samples(Protocol):
    """The images of one split and their classes."""

    @property
    def labels(self) -> Indices:
        """Class of every image, int64 (N,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Images:
        """A fresh uint8 array (B, C, H, W) of the images at these indices."""
        ...


class Rows(Protocol):
    """One split as the loader reads it: images, or rows of text."""

    @property
    def labels(self) -> Indices | Bytes:
        """Class of every image, int64 (N,); or the byte that follows each of a row, uint8 (N, T)."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Images | Bytes:
        """A fresh uint8 array, (B, C, H, W) of images or (B, T) of text."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySamples:
    """Images that lie in memory, uint8 (N, C, H, W)."""

    images: Images
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> Images:
        return self.images[indices]


class SubsetSamples:
    """Some of another split's images, without a copy: image i is the parent's image kept[i]."""

    def __init__(self, parent: Samples, kept: Indices) -> None:
        self._parent = parent
        self._kept = kept
        self.labels: Indices = parent.labels[kept]

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, indices: Indices) -> Images:
        return self._parent.read(self._kept[indices])


@dataclass(frozen=True, eq=False)
class Collection:
    """A data set as published, before a validation split is held out of train.

    Attributes:
        mean, std: of each channel, of pixels scaled to [0, 1].
    """

    train: Samples
    test: Samples
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready to train on."""

    spec: DataSpec
    train: Rows
    valid: Rows
    test: Rows
