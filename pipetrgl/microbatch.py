"""The one message: a micro-batch carries an activation, its targets and where it stands in the stream."""

from __future__ import annotations

import enum
from dataclasses import dataclass

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
        closes_step: the last micro-batch of an optimizer step.
        closes_split: the last micro-batch of an epoch (train) or of one evaluation (valid, test).
        closes_phase: the last micro-batch in which its stages learn for now: of a phase, or in the parallel order of
            the run.
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

    @property
    def num_rows(self) -> int:
        return int(self.target.shape[0])

    @property
    def is_tick(self) -> bool:
        """Whether it carries nothing: what an idle stage gets, so that it keeps count of the stream."""
        return isinstance(self.activation, tuple) and not self.activation

    def carrying(self, activation: Activation) -> MicroBatch:
        """The same micro-batch with another activation: what a stage hands on."""
        other = object.__new__(MicroBatch)  # as dataclasses.replace does, at a tenth of its time
        other.__dict__.update(self.__dict__, activation=activation)
        return other
