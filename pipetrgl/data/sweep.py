"""The phases of a training order: which stages learn in which optimizer steps.

          parallel        sequential      multi_lap, laps: 2     a column an epoch; epochs: 1, epochs_growth: 1
stage 0   ■ ■ ■           ■ ─ ─ ─ ─ ─     ■ ─ ─ ─ ─ ─ ■ ─ ─ ─ ─ ─      ■ learns
stage 1   ■ ■ ■           · ■ ■ ─ ─ ─     · ■ ■ ─ ─ ─ · ■ ■ ─ ─ ─      ─ frozen, hands on
stage 2   ■ ■ ■           · · · ■ ■ ■     · · · ■ ■ ■ · · · ■ ■ ■      · idle
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import final

from pipetrgl.config.schema import TrainConfig


@dataclass(frozen=True, slots=True)
class Phase:
    """Consecutive optimizer steps in which the same stages learn.

    Attributes:
        lap: of the whole sweep, from 0.
        learners: the stages that learn; those before them hand on, those behind them are idle.
        reached: the stages whose heads an evaluation scores; those behind them have never learned, and in the
            end-to-end order those before the last have no head.
        steps: optimizer steps of the run, from 0.
        epochs: passes over the training split; `train.max_steps` may end the last phase within them.
    """

    lap: int
    learners: range
    reached: range
    steps: range
    epochs: int


@final
class Sweep:
    """All phases of a run, a pure function of the config, the number of stages and the steps of an epoch.

    Attributes:
        phases: in order; those that `train.max_steps` leaves nothing of are left out.
        num_epochs: of all phases, those included.
        total_steps: of the run.
    """

    def __init__(self, train: TrainConfig, num_stages: int, steps_per_epoch: int) -> None:
        everyone, plans = range(num_stages), []
        if not train.one_by_one:
            headed = everyone[-1:] if train.order == "end_to_end" else everyone
            plans.append((0, everyone, headed, train.epochs))
        else:
            for lap in range(train.laps):
                for stage in everyone:
                    reached = range(stage + 1) if lap == 0 else everyone
                    epochs = train.epochs + stage * train.epochs_growth
                    plans.append((lap, range(stage, stage + 1), reached, epochs))
        self.num_epochs = sum(epochs for *_, epochs in plans)
        self.total_steps = self.num_epochs * steps_per_epoch
        if train.max_steps is not None:
            self.total_steps = min(self.total_steps, train.max_steps)
        phases, start = [], 0
        for lap, learners, reached, epochs in plans:
            end = start + epochs * steps_per_epoch
            if start < self.total_steps:
                phases.append(Phase(lap, learners, reached, range(start, min(end, self.total_steps)), epochs))
            start = end
        self.phases = tuple(phases)
        self._ends = [phase.steps.stop for phase in phases]

    def phase_of(self, step: int) -> Phase:
        """The phase that takes 0-based optimizer step `step`."""
        return self.phases[bisect_right(self._ends, step)]

    def phase_after(self, num_taken: int) -> Phase:
        """The phase that took the last of `num_taken` steps: to which an evaluation there belongs."""
        return self.phase_of(max(num_taken - 1, 0))

    def closes_phase(self, step: int) -> bool:
        """Whether 0-based optimizer step `step` is the last of its phase."""
        return self.phase_of(step).steps[-1] == step

    def num_updates(self, stage: int, num_taken: int) -> int:
        """How many of the run's first `num_taken` optimizer steps are the stage's own."""
        own = (phase.steps for phase in self.phases if stage in phase.learners)
        return sum(min(max(num_taken - steps.start, 0), len(steps)) for steps in own)
