"""The wire header: one fixed int64 vector that says everything about a micro-batch but its payload.

word  0 protocol version   1 run id     2 kind         3 split      4 epoch      5 step     6 index
      7 row_start          8 batch_rows 9 flags
     10 .. 81 the layout, mostly the same as the one before:
        10 codec, 11 number of payload tensors, 12 target dimensions, 13 .. 16 target shape
        17 .. 80 payload tensors: dtype, dimensions, 6 sizes each
        81 whether the last of them are the image's
     82 first row of the whole micro-batch, and 83 their number, which is 0 where it is no share of one
     96 .. targets, then sample positions (`label_words` words, agreed at start)

Headers are filled and read through numpy: after a wait a call of torch costs 10 to 40 us, one of numpy a quarter. For
the same reason writer and reader keep the last layout, and do again only what may have changed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, Split

Words = npt.NDArray[np.int64]

PROTOCOL = 4
HEADER_WORDS = 96
MAX_TENSORS = 8
_LAYOUT_AT = 10
_TENSORS_AT = 17
_WORDS_PER_TENSOR = 8
_MAX_DIMS = 6
_IMAGE_AT = _TENSORS_AT + MAX_TENSORS * _WORDS_PER_TENSOR
_WHOLE_AT = _IMAGE_AT + 1
_NOTHING = torch.empty(0)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64)
_SPLITS = tuple(Split)


class Kind(enum.IntEnum):
    """What a header announces."""

    DATA = 0
    END = 1


_KINDS = tuple(Kind)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one payload tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Layout:
    """What a header says of memory.

    Attributes:
        codec: code of the codec.
        tensors: of the whole payload.
        has_image: the last of them are the image's.
        target_shape: of the labels.
    """

    codec: int
    tensors: tuple[TensorSpec, ...]
    has_image: bool
    target_shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.target_shape[0] if self.target_shape else 0


@dataclass(frozen=True)
class Header:
    """A header as read.

    Attributes:
        layout: the same object as in the header before, where nothing of it has changed.
        labelled: the micro-batch without its payload.
    """

    kind: Kind
    layout: Layout
    labelled: MicroBatch


def label_words(max_rows: int, target_shape: Sequence[int] = ()) -> int:
    """Words that targets of `max_rows` samples and their positions take; the same on both sides of a link."""
    return max_rows * (math.prod(target_shape) + 1)


@final
class Writer:
    """Writes the headers of one stream.

    Args:
        codec: code of the codec.
        run_id: 63 bits.
        words: of labels in every header.
    """

    def __init__(self, codec: int, run_id: int, words: int) -> None:
        self._codec = codec
        self._words = words
        self._empty = np.zeros(HEADER_WORDS + words, dtype=np.int64)
        self._empty[:2] = PROTOCOL, run_id
        self._key: object = None
        self._laid_out = self._empty

    def write(self, labelled: MicroBatch, parts: Sequence[Tensor], has_image: bool) -> Tensor:
        """The header of a micro-batch.

        Args:
            labelled: the micro-batch; its activation and image are not looked at.
            parts: what travels in their place.
            has_image: the last of them are the image's.
        Raises:
            LinkError: more tensors, dimensions or labels than a header can hold.
        """
        target, positions = labelled.target, labelled.positions
        key = (has_image, target.shape, *((part.dtype, part.shape) for part in parts))
        if key != self._key:
            self._laid_out, self._key = self._lay_out(labelled, parts, has_image), key
        header = self._laid_out.copy()
        flags = labelled.closes_step + 2 * labelled.closes_split + 4 * labelled.closes_phase
        header[2:_LAYOUT_AT] = (
            Kind.DATA, labelled.split, labelled.epoch, labelled.step, labelled.index,
            labelled.row_start, labelled.batch_rows, flags,
        )  # fmt: skip
        if (whole := labelled.share_of) is not None:
            header[_WHOLE_AT : _WHOLE_AT + 2] = whole.start, len(whole)
        targets, rows = target.numpy().reshape(-1), positions.numpy()
        middle = HEADER_WORDS + targets.size
        header[HEADER_WORDS:middle] = targets
        header[middle : middle + rows.size] = rows
        return torch.from_numpy(header)

    def end(self) -> Tensor:
        """The header that ends the stream."""
        header = self._empty.copy()
        header[2] = Kind.END
        return torch.from_numpy(header)

    def _lay_out(self, labelled: MicroBatch, parts: Sequence[Tensor], has_image: bool) -> Words:
        target = labelled.target
        if len(parts) > MAX_TENSORS or any(part.ndim > _MAX_DIMS for part in parts) or target.ndim > 4:
            raise LinkError(f"a payload of {len(parts)} tensors does not fit a header: {MAX_TENSORS} of {_MAX_DIMS}-d")
        if target.numel() + labelled.positions.numel() > self._words:
            raise LinkError(f"{labelled.num_rows} rows of labels do not fit the {self._words} words agreed at start")
        fields = [self._codec, len(parts), target.ndim, *target.shape, *[0] * (4 - target.ndim)]
        for part in parts:
            fields += [_DTYPES.index(part.dtype), part.ndim, *part.shape, *[0] * (_MAX_DIMS - part.ndim)]
        laid_out = self._empty.copy()
        laid_out[_LAYOUT_AT : _LAYOUT_AT + len(fields)] = fields
        laid_out[_IMAGE_AT] = has_image
        return laid_out


@final
class Reader:
    """Reads the headers of one stream; the inverse of a `Writer` of the same run."""

    def __init__(self, run_id: int) -> None:
        self._run_id = run_id
        self._key = b""
        self._layout: Layout | None = None

    def read(self, words: Words) -> Header:
        """The header in `words`; copies the labels, so that these may be used again.

        Raises:
            LinkError: another protocol version or another run's message.
        """
        protocol, run_id, kind, split, epoch, step, index, row_start, batch_rows, flags = words[:_LAYOUT_AT].tolist()
        if protocol != PROTOCOL:
            raise LinkError(f"got wire protocol {protocol}, expected {PROTOCOL}; the workers run different versions")
        if run_id != self._run_id:
            raise LinkError("got a message of another run; two runs share a store")
        layout = self._layout_in(words[_LAYOUT_AT : _IMAGE_AT + 1])
        rows, shape = layout.num_rows, layout.target_shape
        num_targets = math.prod(shape) if rows else 0
        labels = words[HEADER_WORDS : HEADER_WORDS + num_targets + rows].copy()
        first, size = words[_WHOLE_AT : _WHOLE_AT + 2].tolist()
        labelled = MicroBatch(
            activation=_NOTHING,
            target=torch.from_numpy(labels[:num_targets].reshape(shape or (0,))),
            positions=torch.from_numpy(labels[num_targets:]),
            split=_SPLITS[split],
            epoch=epoch,
            step=step,
            index=index,
            row_start=row_start,
            batch_rows=batch_rows,
            closes_step=bool(flags & 1),
            closes_split=bool(flags & 2),
            closes_phase=bool(flags & 4),
            share_of=range(first, first + size) if size else None,
        )
        return Header(_KINDS[kind], layout, labelled)

    def _layout_in(self, words: Words) -> Layout:
        key = words.tobytes()
        if self._layout is None or key != self._key:
            codec, num_tensors, num_dims, *rest = words.tolist()
            tensors = tuple(_tensor(rest[4 + i * _WORDS_PER_TENSOR :]) for i in range(num_tensors))
            self._layout, self._key = Layout(codec, tensors, bool(rest[-1]), tuple(rest[:num_dims])), key
        return self._layout


def _tensor(fields: list[int]) -> TensorSpec:
    dtype, num_dims, *sizes = fields[:_WORDS_PER_TENSOR]
    return TensorSpec(tuple(sizes[:num_dims]), _DTYPES[dtype])
