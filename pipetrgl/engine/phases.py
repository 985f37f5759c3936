"""Training orders: which stage learns from which micro-batch."""

from __future__ import annotations

from typing import Protocol, final

from pipetrgl.microbatch import MicroBatch, Split


class Plan(Protocol):
    """One training order."""

    def trains(self, stage: int, micro_batch: MicroBatch) -> bool:
        """Whether `stage` learns from it; otherwise the micro-batch only passes, in eval mode without graph."""


@final
class Parallel:
    """Every stage learns from every training micro-batch, all at the same time."""

    def trains(self, stage: int, micro_batch: MicroBatch) -> bool:
        return micro_batch.split is Split.TRAIN
