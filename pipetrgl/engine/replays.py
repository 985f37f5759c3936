"""Reused micro-batches: a step of the stage alone, between two of the stream, for none but it takes note of them.

    inbox ─▶ fresh  ─▶ forward, sent on, backward, update, hooks              schedule, metrics, checkpoints go on
    inbox ─▶ reused ─▶ forward,          backward, update                     they do not; `num_reused` goes up

The loop is not touched: in the replay order its stage, outbox and hooks are wrapped.
"""

from __future__ import annotations

from typing import final

from pipetrgl.channels.changing import ChangingOutbox
from pipetrgl.channels.contracts import Inbox, Outbox, WatchedInbox
from pipetrgl.channels.replaying import ReplayingInbox
from pipetrgl.config.schema import TrainConfig
from pipetrgl.engine.loop import Hook, Trainee
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput


def reusing(config: TrainConfig, inbox: Inbox) -> Inbox:
    """The inbox of a stage behind another, which in the replay order also gives what it gave before."""
    if config.order != "replay":
        return inbox
    assert isinstance(inbox, WatchedInbox), "only that of a stage with several senders is not; the schema refuses these"
    return ReplayingInbox(inbox, config.replay.size, config.replay.max_reuse)


def fresh_only(config: TrainConfig, outbox: Outbox) -> Outbox:
    """The outbox, which in the replay order sends no reused micro-batch on: the next stage has had it already."""
    if config.order != "replay":
        return outbox
    return ChangingOutbox(outbox, lambda micro_batch: None if micro_batch.reused else micro_batch)


@final
class ReplayingStage:
    """A stage whose updates on reused micro-batches are counted apart, at the rate of the stream's next step.

    Args:
        trainee: wrapped.
        stage: the one within, which counts.
    """

    def __init__(self, trainee: Trainee, stage: Stage) -> None:
        self._trainee = trainee
        self._stage = stage
        self._reused = False

    @property
    def index(self) -> int:
        return self._trainee.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        self._reused = micro_batch.reused
        return self._trainee.forward(micro_batch, train)

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._trainee.backward(output, micro_batch)

    def update(self) -> None:
        stage = self._stage
        counts = stage.num_updates, stage.skipped_updates
        self._trainee.update()
        if self._reused:
            stage.num_updates, stage.skipped_updates = counts
            stage.num_reused += 1


@final
class FreshHook:
    """A hook that is not told of reused micro-batches."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if not micro_batch.reused:
            self._hook(micro_batch, output)

    def close(self) -> None:
        self._hook.close()
