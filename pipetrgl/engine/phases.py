"""Training orders: what each stage does with each micro-batch.

          parallel        sequential
stage 0   ■ ■ ■           ■ ─ ─ ─ ─ ─      ■ TRAIN: learns from it
stage 1   ■ ■ ■           · ■ ■ ─ ─ ─      ─ PASS: frozen, hands on what it makes of it
stage 2   ■ ■ ■           · · · ■ ■ ■      · IDLE: only counts it
"""

from __future__ import annotations

import enum
from typing import Protocol, final

from pipetrgl.data.seen import Seen
from pipetrgl.data.sweep import Sweep
from pipetrgl.microbatch import MicroBatch, Split


class Role(enum.Enum):
    """What a stage does with a micro-batch."""

    TRAIN = enum.auto()
    PASS = enum.auto()
    IDLE = enum.auto()


class Plan(Protocol):
    """One training order."""

    def role(self, stage: int, micro_batch: MicroBatch) -> Role:
        """TRAIN: learns from it; PASS: eval mode without graph; IDLE: gets a tick, and makes nothing of it."""

    def feeds(self, stage: int, micro_batch: MicroBatch) -> bool:
        """Whether the stage is handed an activation; else it gets a tick."""


@final
class Parallel:
    """Every stage learns from every training micro-batch: in the replay order from some again, or end to end."""

    def role(self, stage: int, micro_batch: MicroBatch) -> Role:
        return Role.TRAIN if micro_batch.split is Split.TRAIN else Role.PASS

    def feeds(self, stage: int, micro_batch: MicroBatch) -> bool:
        return True


@final
class OneByOne:
    """The sequential and the multi-lap order: one stage learns at a time, those before it are frozen.

    An evaluation reaches every stage that has learned or is learning, so from the end of the first lap on all of them.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def role(self, stage: int, micro_batch: MicroBatch) -> Role:
        if micro_batch.split is not Split.TRAIN:
            return Role.PASS if stage in self._sweep.phase_after(micro_batch.step).reached else Role.IDLE
        learners = self._sweep.phase_of(micro_batch.step).learners
        if stage in learners:
            return Role.TRAIN
        return Role.PASS if stage < learners.start else Role.IDLE

    def feeds(self, stage: int, micro_batch: MicroBatch) -> bool:
        return self.role(stage, micro_batch) is not Role.IDLE


@final
class Recalling:
    """An order whose learner recalls what it was handed before; the stages before it are idle meanwhile.

              sequential      with recall, 2 epochs each
    stage 0   ■ ■ ─ ─ ─ ─     ■ ■ ─ · ─ ·
    stage 1   · · ■ ■ ─ ─     · · ■ ■ ─ ·
    stage 2   · · · · ■ ■     · · · · ■ ■
    """

    def __init__(self, plan: Plan, seen: Seen) -> None:
        self._plan = plan
        self._seen = seen

    def role(self, stage: int, micro_batch: MicroBatch) -> Role:
        role = self._plan.role(stage, micro_batch)
        return Role.IDLE if role is Role.PASS and self._recalls(micro_batch) else role

    def feeds(self, stage: int, micro_batch: MicroBatch) -> bool:
        return self._plan.feeds(stage, micro_batch) and not self._recalls(micro_batch)

    def _recalls(self, micro_batch: MicroBatch) -> bool:
        return micro_batch.split is Split.TRAIN and self._seen.all(micro_batch.step, micro_batch.positions.numpy())


def plan_of(order: str, sweep: Sweep) -> Plan:
    """The plan of `train.order`."""
    return OneByOne(sweep) if order in ("sequential", "multi_lap") else Parallel()
