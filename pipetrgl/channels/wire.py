"""The wire header: one fixed int64 vector that says everything about a micro-batch but its payload.

word  0 protocol version   1 run id     2 kind         3 split      4 epoch      5 step     6 index
      7 row_start          8 batch_rows 9 flags       10 codec     11 number of payload tensors
     12 target dimensions 13 .. 16 target shape       17 .. 80 payload tensors: dtype, dimensions, 6 sizes each;
                                                      flag 8: the image's come behind the activation's
     81 first row of the whole micro-batch, and 82 their number, which is 0 where it is no share of one
     96 .. targets, then sample positions (`label_words` words, agreed at start)

Headers are filled and read through numpy: after a wait a call of torch costs 10 to 40 us, one of numpy a quarter.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, Split

Words = npt.NDArray[np.int64]

PROTOCOL = 3
HEADER_WORDS = 96
MAX_TENSORS = 8
_TENSORS_AT = 17
_WORDS_PER_TENSOR = 8
_MAX_DIMS = 6
_WHOLE_AT = _TENSORS_AT + MAX_TENSORS * _WORDS_PER_TENSOR
_NOTHING = torch.empty(0)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64)


class Kind(enum.IntEnum):
    """What a header announces."""

    DATA = 0
    END = 1


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one payload tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Header:
    """A header as read.

    Attributes:
        tensors: of the whole payload.
        has_image: the last of them are the image's.
        labelled: the micro-batch without its payload.
    """

    kind: Kind
    codec: int
    tensors: tuple[TensorSpec, ...]
    has_image: bool
    labelled: MicroBatch


def label_words(max_rows: int, target_shape: Sequence[int] = ()) -> int:
    """Words that targets of `max_rows` samples and their positions take; the same on both sides of a link."""
    return max_rows * (math.prod(target_shape) + 1)


def write_end(run_id: int, words: int) -> Tensor:
    """The header that ends a stream."""
    header = torch.zeros(HEADER_WORDS + words, dtype=torch.int64)
    header[:3] = torch.tensor([PROTOCOL, run_id, Kind.END])
    return header


def write(micro_batch: MicroBatch, parts: Sequence[Tensor], codec: int, run_id: int, words: int) -> Tensor:
    """The header of `micro_batch` whose activation, and image if it has one, travel as `parts`.

    Raises:
        LinkError: more tensors, dimensions or labels than a header can hold.
    """
    target, positions = micro_batch.target, micro_batch.positions
    if len(parts) > MAX_TENSORS or any(part.ndim > _MAX_DIMS for part in parts) or target.ndim > 4:
        raise LinkError(f"a payload of {len(parts)} tensors does not fit a header: {MAX_TENSORS} of {_MAX_DIMS}-d")
    if target.numel() + positions.numel() > words:
        raise LinkError(f"{micro_batch.num_rows} rows of labels do not fit the {words} words agreed at start")
    flags = micro_batch.closes_step + 2 * micro_batch.closes_split + 4 * micro_batch.closes_phase
    flags += 8 * (micro_batch.image is not None)
    fields = [PROTOCOL, run_id, Kind.DATA, micro_batch.split, micro_batch.epoch, micro_batch.step, micro_batch.index]
    fields += [micro_batch.row_start, micro_batch.batch_rows, flags, codec, len(parts)]
    fields += [target.ndim, *target.shape, *[0] * (4 - target.ndim)]
    for part in parts:
        fields += [_DTYPES.index(part.dtype), part.ndim, *part.shape, *[0] * (_MAX_DIMS - part.ndim)]
    header = np.zeros(HEADER_WORDS + words, dtype=np.int64)
    header[: len(fields)] = fields
    if (whole := micro_batch.share_of) is not None:
        header[_WHOLE_AT : _WHOLE_AT + 2] = whole.start, len(whole)
    labels = header[HEADER_WORDS:]
    labels[: target.numel()] = target.numpy().reshape(-1)
    labels[target.numel() : target.numel() + positions.numel()] = positions.numpy()
    return torch.from_numpy(header)


def read(words: Words, run_id: int) -> Header:
    """The inverse of `write`, from its words; copies the labels, so that these may be used again.

    Raises:
        LinkError: another protocol version or another run's message.
    """
    fields = words[:HEADER_WORDS].tolist()
    if fields[0] != PROTOCOL:
        raise LinkError(f"got wire protocol {fields[0]}, expected {PROTOCOL}; the workers run different versions")
    if fields[1] != run_id:
        raise LinkError("got a message of another run; two runs share a store")
    target_shape = fields[13 : 13 + fields[12]]
    rows = target_shape[0] if target_shape else 0
    num_targets = math.prod(target_shape) if rows else 0
    labels = words[HEADER_WORDS : HEADER_WORDS + num_targets + rows].copy()
    first, size = fields[_WHOLE_AT : _WHOLE_AT + 2]
    labelled = MicroBatch(
        activation=_NOTHING,
        target=torch.from_numpy(labels[:num_targets].reshape(target_shape or (0,))),
        positions=torch.from_numpy(labels[num_targets:]),
        split=Split(fields[3]),
        epoch=fields[4],
        step=fields[5],
        index=fields[6],
        row_start=fields[7],
        batch_rows=fields[8],
        closes_step=bool(fields[9] & 1),
        closes_split=bool(fields[9] & 2),
        closes_phase=bool(fields[9] & 4),
        share_of=range(first, first + size) if size else None,
    )
    tensors = tuple(_tensor(fields, i) for i in range(fields[11]))
    return Header(Kind(fields[2]), fields[10], tensors, bool(fields[9] & 8), labelled)


def _tensor(fields: list[int], position: int) -> TensorSpec:
    start = _TENSORS_AT + position * _WORDS_PER_TENSOR
    dtype, ndim = fields[start], fields[start + 1]
    return TensorSpec(tuple(fields[start + 2 : start + 2 + ndim]), _DTYPES[dtype])
