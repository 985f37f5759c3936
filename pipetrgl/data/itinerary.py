"""The itinerary of a run: which rows travel in which micro-batch, from the first to the last."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from pipetrgl.config.schema import EvaluateConfig, TrainConfig
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.sweep import Sweep
from pipetrgl.errors import DataError
from pipetrgl.microbatch import Split


@dataclass(frozen=True, slots=True)
class Stop:
    """One micro-batch before it holds any data.

    Attributes:
        first_row, end_row: rows of the epoch's order (train) or of the split as stored (valid, test).
        row_start, batch_rows: its place within the step's batch; an evaluation counts as one batch, the whole split.
        share_of: rows of the whole micro-batch, where this is one replica's share.

    The others are those of MicroBatch.
    """

    split: Split
    epoch: int
    step: int
    index: int
    first_row: int
    end_row: int
    row_start: int
    batch_rows: int
    closes_step: bool
    closes_split: bool
    closes_phase: bool
    share_of: range | None = None

    @property
    def num_rows(self) -> int:
        return self.end_row - self.first_row

    def share(self, of: Callable[[range], range]) -> Stop:
        """One replica's share: `of` gives its rows, among those of the step."""
        whole = range(self.row_start, self.row_start + self.num_rows)
        mine = of(whole)
        first_row = self.first_row + mine.start - self.row_start
        return replace(self, first_row=first_row, end_row=first_row + len(mine), row_start=mine.start, share_of=whole)


class Itinerary:
    """The pure plan of a run's stream; every worker derives the same one from the config and the data's specification.

        [valid] t t t t [valid] t t t t [valid] [test]       t: accumulate micro-batches of one optimizer step
        at_start        valid_every      last step

    Args:
        num_stages: K, whose phases follow each other if the order is not parallel; epochs count on through all of them.
        least_rows: that every micro-batch must have, for the stage with the most replicas.
    Raises:
        DataError: the training split is too small for one optimizer step, or a split has too few rows for the replicas.
    """

    def __init__(
        self, train: TrainConfig, evaluate: EvaluateConfig, spec: DataSpec, num_stages: int, least_rows: int = 1
    ) -> None:
        self._train = train
        self._evaluate = evaluate
        self._spec = spec
        num_full, rest = divmod(spec.num_train, train.batch)
        # A rest of one row has no variance for BatchNorm.
        self._rest = 0 if train.drop_last or rest == 1 else rest
        self._least_rows = least_rows
        self.steps_per_epoch = num_full + (self._rest > 0)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"train.batch: the training split has {spec.num_train} images, too few for one step of {train.batch} "
                f"rows{' with train.drop_last' if train.drop_last else ''}. Use a smaller batch or more images."
            )
        if 0 < self._rest < least_rows:
            raise DataError(
                f"train.batch: the last step of an epoch has {rest} rows, but these replicas need {least_rows}. "
                "Use train.drop_last or another batch."
            )
        for split, num_rows in (("validation", spec.num_valid), ("test", spec.num_test)):
            if 0 < num_rows < least_rows:
                raise DataError(f"the {split} split has {num_rows} rows, but these replicas need {least_rows}")
        self.sweep = Sweep(train, num_stages, self.steps_per_epoch)
        self.total_steps = self.sweep.total_steps

    @cached_property
    def num_stops(self) -> int:
        """Micro-batches of the whole run."""
        return self._num_stops_before(self.total_steps)

    def stops(self, first_step: int = 0) -> Iterator[Stop]:
        """Every micro-batch in order; from `first_step` > 0 on, the tail of the uninterrupted run with its indices.

        The tail starts with the evaluation that follows step `first_step` - 1, if one does: a checkpoint of that step
        was taken before it.
        """
        index = self.first_index(first_step)
        yield from self._evaluations(first_step, index)
        index += self._num_evaluation_stops(first_step)
        for step in range(first_step, self.total_steps):
            yield from self._step(step, index)
            index += self._num_parts(step)
            yield from self._evaluations(step + 1, index)
            index += self._num_evaluation_stops(step + 1)

    def visited_rows(self, first_step: int) -> range:
        """Of the order of the epoch of `first_step`: those in its training batches from that step on."""
        start = first_step % self.steps_per_epoch * self._train.batch
        return range(start, self._spec.num_train // self._train.batch * self._train.batch + self._rest)

    def first_index(self, first_step: int) -> int:
        """Index of the first micro-batch of `stops(first_step)`."""
        return self._num_stops_before(first_step) - self._num_evaluation_stops(first_step)

    def _step(self, step: int, index: int) -> Iterator[Stop]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        batch_start = step_in_epoch * self._train.batch
        rows = self._num_rows(step)
        parts = divided(rows, self._train, self._least_rows)
        ends_epoch = step_in_epoch == self.steps_per_epoch - 1 or step == self.total_steps - 1
        for number, part in enumerate(parts):
            last = part.stop == rows
            yield Stop(
                split=Split.TRAIN,
                epoch=epoch,
                step=step,
                index=index + number,
                first_row=batch_start + part.start,
                end_row=batch_start + part.stop,
                row_start=part.start,
                batch_rows=rows,
                closes_step=last,
                closes_split=last and ends_epoch,
                closes_phase=last and self.sweep.closes_phase(step),
            )

    def _evaluations(self, num_taken: int, index: int) -> Iterator[Stop]:
        for split, num_rows in self._splits_after(num_taken):
            row = 0
            for end in self._ends(num_rows):
                yield Stop(
                    split=split,
                    epoch=max(num_taken - 1, 0) // self.steps_per_epoch,
                    step=num_taken,
                    index=index,
                    first_row=row,
                    end_row=end,
                    row_start=row,
                    batch_rows=num_rows,
                    closes_step=False,
                    closes_split=end == num_rows,
                    closes_phase=False,
                )
                index, row = index + 1, end

    def _ends(self, num_rows: int) -> list[int]:
        """Where the micro-batches of an evaluation end; the last takes rows from the one before to have enough."""
        ends = [*range(self._evaluate.batch, num_rows, self._evaluate.batch), num_rows]
        if len(ends) > 1 and ends[-1] - ends[-2] < self._least_rows:
            ends[-2] = num_rows - self._least_rows
        return ends

    def _splits_after(self, num_taken: int) -> list[tuple[Split, int]]:
        """The splits to evaluate, with their rows, once `num_taken` optimizer steps are taken; empty ones left out."""
        splits: list[tuple[Split, int]] = []
        if self._validates_after(num_taken):
            splits.append((Split.VALID, self._spec.num_valid))
        if num_taken == self.total_steps and self._evaluate.test_at_end:
            splits.append((Split.TEST, self._spec.num_test))
        return [(split, num_rows) for split, num_rows in splits if num_rows > 0]

    def _validates_after(self, num_taken: int) -> bool:
        """At step 0 if `at_start`, else at round(k * valid_every * steps_per_epoch) for k = 1, 2, .. or the end."""
        if num_taken == 0:
            return self._evaluate.at_start
        period = self._evaluate.valid_every * self.steps_per_epoch
        if period == 0:
            return False
        nearest = round(num_taken / period)
        return num_taken == self.total_steps or any(
            k >= 1 and round(k * period) == num_taken for k in (nearest - 1, nearest, nearest + 1)
        )

    def _num_rows(self, step: int) -> int:
        is_rest = self._rest > 0 and (step + 1) % self.steps_per_epoch == 0
        return self._rest if is_rest else self._train.batch

    def _num_parts(self, step: int) -> int:
        return _num_parts(self._num_rows(step), self._train, self._least_rows)

    def _num_evaluation_stops(self, num_taken: int) -> int:
        return sum(-(-num_rows // self._evaluate.batch) for _, num_rows in self._splits_after(num_taken))

    def _num_stops_before(self, step: int) -> int:
        """Micro-batches of the first `step` steps and of the evaluations before, between and after them."""
        return self._num_evaluation_stops(0) + sum(
            self._num_parts(taken) + self._num_evaluation_stops(taken + 1) for taken in range(step)
        )


def divided(rows: int, train: TrainConfig, least_rows: int = 1) -> list[range]:
    """The rows of each micro-batch of an optimizer step, in order; sizes differ by one at most, the larger ones first.

    Args:
        rows: of the step.
        least_rows: that every micro-batch must have.
    """
    num_parts = _num_parts(rows, train, least_rows)
    size, num_larger = divmod(rows, num_parts)
    ends = [number * size + min(number, num_larger) for number in range(num_parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _num_parts(rows: int, train: TrainConfig, least_rows: int) -> int:
    if rows == train.batch:
        return train.accumulate
    # The smaller rest makes fewer micro-batches rather than single rows, of which BatchNorm has no variance.
    return min(train.accumulate, rows // max(2, least_rows))
