"""A text as rows of bytes: what each byte of a row is to be told of is the byte that follows it.

file    |────────────── train ──────────────|── valid ──|─ test ─|rest       parts of the file, in its order
row     [b0 b1 .. bT]  reads b0 .. b(T-1), targets b1 .. bT                  rows follow each other without overlap
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipetrgl.config.schema import DataConfig
from pipetrgl.data.dataset import Bytes, Dataset, DataSpec, Indices
from pipetrgl.data.janeausten import novels
from pipetrgl.errors import DataError

NUM_BYTES = 256
"""The vocabulary."""
TEST_SHARE = 0.1
"""Of all rows."""


@dataclass(frozen=True, eq=False)
class TextSamples:
    """Consecutive rows, uint8 (N, T + 1)."""

    rows: Bytes

    @property
    def labels(self) -> Bytes:
        return self.rows[:, 1:]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Indices) -> Bytes:
        return self.rows[indices, :-1]


def text(config: DataConfig) -> Dataset:
    """The file `data.root`, or else Jane Austen's novels; no row of one split is near one of another but at the seams.

    Test is the last tenth of the rows, validation the last `valid_fraction` of the others, whatever the seed.

    Raises:
        DataError: no such file, not UTF-8, too short, or fewer training rows than asked for.
    """
    rows = _rows(novels() if config.root is None else _read(Path(config.root)), config)
    num_others = len(rows) - round(TEST_SHARE * len(rows))
    num_train = num_others - round(config.valid_fraction * num_others)
    if (config.num_train or 0) > num_train:
        raise DataError(
            f"data.num_train: {config.num_train} is not allowed. The training part has {num_train} rows of "
            f"{config.context + 1} bytes."
        )
    train, valid, test = (
        TextSamples(part)
        for part in (rows[: config.num_train or num_train], rows[num_train:num_others], rows[num_others:])
    )
    spec = DataSpec(config.name, len(train), len(valid), len(test), (config.context,), NUM_BYTES)
    return Dataset(spec, train, valid, test)


def _read(path: Path) -> bytes:
    try:
        content = path.expanduser().read_bytes()
        content.decode()
    except OSError as error:
        raise DataError(f"data.root: cannot read the text '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.root: '{path}' is no UTF-8 text: {error.reason} at byte {error.start}") from None
    return content


def _rows(content: bytes, config: DataConfig) -> Bytes:
    size = config.context + 1
    num_rows = len(content) // size
    if num_rows < 1 / TEST_SHARE:
        raise DataError(
            f"data.context: a text of {len(content)} bytes has {num_rows} rows of {size}; at least "
            f"{1 / TEST_SHARE:.0f} are needed. Use a longer text or a shorter context."
        )
    return np.frombuffer(content, np.uint8, num_rows * size).reshape(num_rows, size)
