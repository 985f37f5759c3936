"""The listening hook: ends a worker that never waits, such as the only stage of a run, when the alarm has rung."""

from __future__ import annotations

from typing import final

from pipetrgl.channels.alarm import Alarm
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput


@final
class Listen:
    """Raises the alarm's error after the micro-batch at hand."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self._alarm.check()

    def close(self) -> None:
        pass
