"""The one message: a micro-batch carries an activation, its targets and where it stands in the stream."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Activation = Tensor | tuple[Tensor, ...]


class Split(enum.IntEnum):
    """The data split that a micro-batch comes from; the value travels in the wire header."""

    TRAIN = 0
    VALID = 1
    TEST = 2

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class MicroBatch:
    """What travels between stages: forward only, in order, never changed on the way.

    Attributes:
        activation: the previous stage's detached output, (N, ...); a tuple where a block gives several, an empty one
            for an idle stage.
        target: class indices int64, (N,) or (N, T).
        positions: int64 (N,), index of each sample in its split; the row order is the epoch's order.
        split: train, valid or test.
        epoch: 0-based epoch that it belongs to.
        step: 0-based optimizer step; an evaluation carries the number of steps taken before it.
        index: place in the whole stream, from 0; consecutive on every link.
        row_start, batch_rows: this micro-batch holds rows row_start : row_start + N of a step's `batch_rows`.
        share_of: the rows of the whole micro-batch, where this is one replica's share of it; None: it is whole.
        reused: the stage has learned from it before; of the replay order, never on a link.
        closes_step: the last micro-batch of an optimizer step.
        closes_split: the last micro-batch of an epoch (train) or of one evaluation (valid, test).
        closes_phase: the last micro-batch in which its stages learn for now: of a phase, or in the parallel order of
            the run.
        image: (N, C, H, W), what stage 0 got, where a later stage's objective needs it; None: none rides along.
    """

    activation: Activation
    target: Tensor
    positions: Tensor
    split: Split
    epoch: int
    step: int
    index: int
    row_start: int
    batch_rows: int
    closes_step: bool
    closes_split: bool
    closes_phase: bool = False
    share_of: range | None = None
    image: Tensor | None = None
    reused: bool = False

    @property
    def num_rows(self) -> int:
        return int(self.target.shape[0])

    @property
    def targets_per_row(self) -> int:
        """1, or one for each token of a text."""
        return self.target.shape[1:].numel()

    @property
    def rows(self) -> range:
        """Of the step, that it holds."""
        return range(self.row_start, self.row_start + self.num_rows)

    @property
    def whole(self) -> range:
        """Rows of the step that all replicas hold of this micro-batch together."""
        return self.rows if self.share_of is None else self.share_of

    @property
    def is_tick(self) -> bool:
        """Whether it carries nothing: what an idle stage gets, so that it keeps count of the stream."""
        return isinstance(self.activation, tuple) and not self.activation

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Of the activation, then the image, if one rides along."""
        tensors = self.activation if isinstance(self.activation, tuple) else (self.activation,)
        return tensors if self.image is None else (*tensors, self.image)

    def carrying(self, activation: Activation) -> MicroBatch:
        """The same micro-batch with another activation: what a stage hands on. An image rides along."""
        return self._changed(activation=activation)

    def beside(self, image: Tensor | None) -> MicroBatch:
        """The same micro-batch with this image."""
        return self._changed(image=image)

    def as_tick(self) -> MicroBatch:
        """The same micro-batch, carrying nothing."""
        return self._changed(activation=(), image=None)

    def _changed(self, **fields: Activation | None) -> MicroBatch:
        other = object.__new__(MicroBatch)  # as dataclasses.replace does, at a tenth of its time
        other.__dict__.update(self.__dict__, **fields)
        return other

    def share(self, rows: range) -> MicroBatch:
        """Its rows that are among `rows` of the step, perhaps none; shares this one's memory."""
        start, stop = max(rows.start, self.row_start), min(rows.stop, self.rows.stop)
        size = max(0, stop - start)
        first = start - self.row_start if size else 0
        return replace(
            self,
            activation=_narrowed(self.activation, first, size),
            image=None if self.image is None or size == 0 else self.image.narrow(0, first, size),
            target=self.target.narrow(0, first, size),
            positions=self.positions.narrow(0, first, size),
            row_start=start,
            share_of=self.whole,
        )


def _narrowed(activation: Activation, first: int, size: int) -> Activation:
    """An empty share carries nothing."""
    if size == 0:
        return ()
    if isinstance(activation, tuple):
        return tuple(tensor.narrow(0, first, size) for tensor in activation)
    return activation.narrow(0, first, size)


def joined(shares: Sequence[MicroBatch]) -> MicroBatch:
    """One micro-batch of the rows of neighbouring shares, in order; copies activations and images."""
    full = [share for share in shares if share.num_rows > 0] or list(shares[:1])
    if len(full) == 1:
        return full[0]
    images = [share.image for share in full if share.image is not None]
    return replace(
        full[0],
        activation=_concatenated([share.activation for share in full]),
        image=torch.cat(images) if images else None,
        target=torch.cat([share.target for share in full]),
        positions=torch.cat([share.positions for share in full]),
    )


def _concatenated(activations: Sequence[Activation]) -> Activation:
    parts = [one if isinstance(one, tuple) else (one,) for one in activations]
    tensors = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return tensors if isinstance(activations[0], tuple) else tensors[0]
