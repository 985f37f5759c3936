"""Rehearsed failures: a stage meets its `launcher.faults` just before the first forward pass of their step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import final

from pipetrgl.config.schema import FaultConfig
from pipetrgl.engine.loop import Trainee
from pipetrgl.microbatch import Activation, MicroBatch, Split
from pipetrgl.stage import StageOutput

logger = logging.getLogger(__name__)


def rehearse(stage: Trainee, faults: Sequence[FaultConfig], run: Path) -> Trainee:
    """The stage with those of a run's faults that are its own; itself if none is."""
    own = {number: fault for number, fault in enumerate(faults) if fault.stage == stage.index}
    return FaultyStage(stage, own, run) if own else stage


@final
class FaultyStage:
    """A stage that fails on purpose.

    kill, raise and hang happen once in the life of a run folder: a file in its `faults/` is made before, or a worker
    that goes on from an earlier step would meet them for ever. nan and slow happen again on the way back to where the
    run was, as everything in those steps does.

    Args:
        stage: that fails.
        faults: by their number in the config.
        run: the run folder.
    """

    def __init__(self, stage: Trainee, faults: dict[int, FaultConfig], run: Path) -> None:
        self._stage = stage
        self._faults = faults
        self._run = run

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        if micro_batch.split is Split.TRAIN and micro_batch.row_start == 0 and not micro_batch.reused:
            for number, fault in self._faults.items():
                if fault.step <= micro_batch.step < fault.step + fault.num_steps:
                    micro_batch = self._meet(number, fault, micro_batch)
        return self._stage.forward(micro_batch, train)

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._stage.backward(output, micro_batch)

    def update(self) -> None:
        self._stage.update()

    def _meet(self, number: int, fault: FaultConfig, micro_batch: MicroBatch) -> MicroBatch:
        if fault.action not in ("nan", "slow") and not self._first_time(number, fault):
            return micro_batch
        what = f"fault injected: {fault.action} of stage {self.index} at step {micro_batch.step}"
        if micro_batch.step == fault.step:  # of many steps in a row, the first one
            logger.warning("%s", what)
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError(what)
            case "hang":
                threading.Event().wait()
            case "slow":
                time.sleep(fault.seconds)
            case "nan":
                return micro_batch.carrying(_poisoned(micro_batch.activation))
        return micro_batch

    def _first_time(self, number: int, fault: FaultConfig) -> bool:
        folder = self._run / "faults"
        folder.mkdir(exist_ok=True)
        try:
            (folder / f"{number}-stage-{fault.stage}-step-{fault.step}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _poisoned(activation: Activation) -> Activation:
    if isinstance(activation, tuple):
        return tuple(tensor * float("nan") for tensor in activation)
    return activation * float("nan")
