"""Training orders: what each stage does with each micro-batch.

          parallel        sequential
stage 0   ■ ■ ■           ■ ─ ─ ─ ─ ─      ■ TRAIN: learns from it
stage 1   ■ ■ ■           · ■ ■ ─ ─ ─      ─ PASS: frozen, hands on what it makes of it
stage 2   ■ ■ ■           · · · ■ ■ ■      · IDLE: only counts it
"""

from __future__ import annotations

import enum
from typing import Protocol, final

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
        """TRAIN: learns from it; PASS: eval mode without graph; IDLE: gets a tick, as do all stages behind it."""


@final
class Parallel:
    """Every stage learns from every training micro-batch: at the same time, or end to end."""

    def role(self, stage: int, micro_batch: MicroBatch) -> Role:
        return Role.TRAIN if micro_batch.split is Split.TRAIN else Role.PASS


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


def plan_of(order: str, sweep: Sweep) -> Plan:
    """The plan of `train.order`."""
    return OneByOne(sweep) if order in ("sequential", "multi_lap") else Parallel()
