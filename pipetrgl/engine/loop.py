"""The loop that runs on every worker, and all that happens there.

inbox ─▶ forward ─▶ send ─▶ backward ─▶ update          one stage, for every micro-batch

               time ─▶
stage 0   F0 B0  F1 B1  F2 B2  F3 B3
stage 1       F0 B0  F1 B1  F2 B2  F3 B3                no stage waits for a backward pass
stage 2           F0 B0  F1 B1  F2 B2  F3 B3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.engine.phases import Plan, Role
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput


class Trainee(Protocol):
    """A stage, or a wrapper of one, as the loop sees it."""

    @property
    def index(self) -> int: ...

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput: ...

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None: ...

    def update(self) -> None: ...


class Hook(Protocol):
    """Looks at every micro-batch after it is done with: metrics, evaluation, checkpoints."""

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None: ...

    def close(self) -> None:
        """The stream has ended."""


def run(stage: Trainee, inbox: Inbox, outbox: Outbox, plan: Plan, hooks: Sequence[Hook]) -> None:
    """Train one stage on a whole stream, evaluations included.

    Raises:
        PipetrglError: the first error of any worker of the run.
    """
    for micro_batch in inbox:  # the data loader on stage 0
        train = plan.role(stage.index, micro_batch) is Role.TRAIN  # parallel, sequential, multi-lap
        output = stage.forward(micro_batch, train)  # residual blocks, then the auxiliary head
        outbox.send(micro_batch.carrying(output.activation.detach()))  # the next stage starts now
        if train:
            stage.backward(output, micro_batch)  # task loss + transport cost / (2 tau)
            if micro_batch.closes_step:
                stage.update()  # replica all-reduce, optimizer, schedule
        for hook in hooks:
            hook(micro_batch, output)
        del micro_batch, output  # while waiting for the next one, nothing of this one stays alive
    outbox.close()
    for hook in hooks:
        hook.close()
