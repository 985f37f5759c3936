"""Idle stages: they get ticks, micro-batches that carry nothing, and so keep count of the stream for its checkpoints.

    stage 1 learns ─▶ sends a tick ─▶ stage 2 idle ─▶ a tick ─▶ stage 3 idle          no activation leaves stage 1

The loop is not touched: where the order is not parallel, its stage and outbox are wrapped.
"""

from __future__ import annotations

from typing import final

import torch

from pipetrgl.channels.changing import ChangingOutbox
from pipetrgl.channels.contracts import Outbox
from pipetrgl.engine.loop import Trainee
from pipetrgl.engine.phases import Parallel, Plan, Role
from pipetrgl.microbatch import MicroBatch
from pipetrgl.objective import LocalLoss
from pipetrgl.stage import StageOutput

_ZERO = torch.zeros(())
NOTHING = StageOutput(torch.empty(0), torch.empty(0), LocalLoss(_ZERO, _ZERO, _ZERO, ()), ())
"""What comes of a tick."""


def idling(plan: Plan, stage: Trainee, outbox: Outbox) -> tuple[Trainee, Outbox]:
    """Only where some stage is idle at times is anything wrapped."""
    if isinstance(plan, Parallel):
        return stage, outbox
    return IdlingStage(stage, plan), ticking(outbox, plan, stage.index + 1)


@final
class IdlingStage:
    """A stage that computes nothing while it is idle."""

    def __init__(self, stage: Trainee, plan: Plan) -> None:
        self._stage = stage
        self._plan = plan

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        assert micro_batch.is_tick != self._plan.feeds(self.index, micro_batch)
        idle = self._plan.role(self.index, micro_batch) is Role.IDLE
        return NOTHING if idle else self._stage.forward(micro_batch, train)

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._stage.backward(output, micro_batch)

    def update(self) -> None:
        self._stage.update()


def ticking(outbox: Outbox, plan: Plan, stage: int) -> Outbox:
    """An outbox that sends a tick wherever its receiver, `stage`, needs no more: it is idle, or recalls its input."""

    def change(micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch if plan.feeds(stage, micro_batch) else micro_batch.as_tick()

    return ChangingOutbox(outbox, change)
