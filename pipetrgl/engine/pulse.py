"""The pulse: whether the stage's own thread still gets anywhere, for a thread that can tell others."""

from __future__ import annotations

import time
from typing import final

from pipetrgl.engine.loop import Trainee
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput


@final
class Pulse:
    """What the stage is at, and since when; written by its own thread, read by another."""

    def __init__(self) -> None:
        self._at: tuple[float, str] | None = None

    def begin(self, what: str) -> None:
        self._at = time.monotonic(), what

    def end(self) -> None:
        self._at = None

    def stuck(self, limit_s: float) -> str | None:
        """What has taken longer than `limit_s` and is still going on; None where nothing has. Waits do not count."""
        at = self._at  # one read: the other thread may end it now
        return at[1] if at is not None and time.monotonic() - at[0] > limit_s else None


@final
class PulsedStage:
    """A stage that says when it begins and ends to compute."""

    def __init__(self, stage: Trainee, pulse: Pulse) -> None:
        self._stage = stage
        self._pulse = pulse
        self._step = 0

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        self._step = micro_batch.step
        self._pulse.begin(f"step {micro_batch.step}: forward")
        output = self._stage.forward(micro_batch, train)
        self._pulse.end()
        return output

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._pulse.begin(f"step {micro_batch.step}: backward")
        self._stage.backward(output, micro_batch)
        self._pulse.end()

    def update(self) -> None:
        self._pulse.begin(f"step {self._step}: update")
        self._stage.update()
        self._pulse.end()
