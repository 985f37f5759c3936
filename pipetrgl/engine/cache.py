"""Caches: one row for each sample of the training split, by its position in it; in memory or on disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from pipetrgl.errors import LaunchError

Shape = tuple[int, ...]


class Cache(Protocol):
    """What a stage was handed, float32; takes room from the first row that it keeps until it forgets."""

    def keep(self, positions: Tensor, rows: Tensor) -> None:
        """Copy rows (N, ...), from any device, under the samples' positions (N,); a later row replaces an earlier."""

    def recall(self, positions: Tensor) -> Tensor:
        """A fresh tensor (N, ...) on the CPU; each of these rows must have been kept."""

    def forget(self) -> None:
        """Everything."""


@final
class MemoryCache:
    """One tensor.

    Args:
        run: not used.
        num_samples: of the training split.
        shape: of a row.
    """

    def __init__(self, run: Path, num_samples: int, shape: Shape) -> None:
        self._shape = (num_samples, *shape)
        self._rows: Tensor | None = None

    def keep(self, positions: Tensor, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = torch.empty(self._shape)
        self._rows.index_copy_(0, positions, rows.cpu())

    def recall(self, positions: Tensor) -> Tensor:
        assert self._rows is not None, "nothing was kept"
        return self._rows.index_select(0, positions)

    def forget(self) -> None:
        self._rows = None


@final
class DiskCache:
    """A file without a name in the run folder: the kernel takes it back however this process ends.

    It is read and written, not mapped, so a full or lost disk is an error with a message and no signal.

    Args:
        run: the run folder.
        num_samples: not used: the file grows.
        shape: of a row.
    """

    def __init__(self, run: Path, num_samples: int, shape: Shape) -> None:
        self._run = run
        self._shape = shape
        self._row_bytes = int(np.prod(shape)) * torch.float32.itemsize
        self._file: int | None = None
        self._close: Callable[[], object] = lambda: None

    def keep(self, positions: Tensor, rows: Tensor) -> None:
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            for position, row in zip(positions.tolist(), rows.cpu().contiguous().numpy(), strict=True):
                self._require_whole(os.pwrite(self._file, row.data, position * self._row_bytes))
        except OSError as error:
            raise self._failure(error.strerror) from error

    def recall(self, positions: Tensor) -> Tensor:
        assert self._file is not None, "nothing was kept"
        rows = np.empty((len(positions), *self._shape), dtype=np.float32)
        try:
            for position, row in zip(positions.tolist(), rows, strict=True):
                self._require_whole(os.preadv(self._file, [row.data], position * self._row_bytes))
        except OSError as error:
            raise self._failure(error.strerror) from error
        return torch.from_numpy(rows)

    def forget(self) -> None:
        self._close()
        self._file = None

    def _open(self) -> None:
        with tempfile.TemporaryFile(dir=self._run) as file:
            self._file = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._file)  # also where a stage ends by an error

    def _require_whole(self, num_bytes: int) -> None:
        if num_bytes != self._row_bytes:
            raise self._failure(f"{num_bytes} of {self._row_bytes} bytes of a row went through")

    def _failure(self, why: str | None) -> LaunchError:
        return LaunchError(f"train.cache: disk: the file in {self._run} failed: {why}; use memory or none")


CACHES: dict[str, Callable[[Path, int, Shape], Cache]] = {"memory": MemoryCache, "disk": DiskCache}
"""By `train.cache`."""
