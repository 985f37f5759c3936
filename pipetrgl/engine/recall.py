"""Recall: a learning stage keeps what the frozen stages before it made of each sample, and recalls it in later epochs.

epoch      first of the phase                 later
stage 0    forward ─▶ activation              idle ─▶ tick
stage 1    keep, forward, backward, update    recall, forward, backward, update

The loop is not touched: its stage is wrapped.
"""

from __future__ import annotations

from typing import final

from pipetrgl.data.seen import Seen
from pipetrgl.engine.cache import Cache
from pipetrgl.engine.loop import Trainee
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput


@final
class RecallingStage:
    """A stage that fills the ticks that it learns from out of a cache.

    Args:
        stage: learns.
        seen: says what a later epoch will ask for.
        cache: of the stage's input; empty between phases.
    """

    def __init__(self, stage: Trainee, seen: Seen, cache: Cache) -> None:
        self._stage = stage
        self._seen = seen
        self._cache = cache

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        return self._stage.forward(self._filled(micro_batch) if train else micro_batch, train)

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._stage.backward(output, micro_batch)

    def update(self) -> None:
        self._stage.update()

    def _filled(self, micro_batch: MicroBatch) -> MicroBatch:
        if micro_batch.is_tick:
            micro_batch = micro_batch.carrying(self._cache.recall(micro_batch.positions))
        elif self._seen.again(micro_batch.step):
            assert not isinstance(micro_batch.activation, tuple), "stages hand on one tensor"
            self._cache.keep(micro_batch.positions, micro_batch.activation)
        if micro_batch.closes_phase:
            self._cache.forget()
        return micro_batch
