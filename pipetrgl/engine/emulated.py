"""Emulated stages: they take a device's time instead of computing, so that many workers run on a small machine.

    inbox ─▶ forward: sleep ─▶ send zeros of the right shape ─▶ backward: sleep ─▶ update: sleep

Links, loop, hooks and launchers are the real ones; see docs/performance.md for what is not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch

from pipetrgl.config.schema import Config
from pipetrgl.microbatch import MicroBatch
from pipetrgl.objective import LocalLoss
from pipetrgl.seeds import NUM_DRAWS, jitter_draws
from pipetrgl.stage import Stage, StageOutput


@final
class Times:
    """What one stage takes, as `pipeline.emulated` says.

    Attributes:
        forward_s, backward_s: of one row.
        update_s: of one optimizer step, whatever its rows.
    """

    def __init__(self, config: Config, stage: int) -> None:
        emulated = config.pipeline.emulated
        rows = emulated.rows or config.train.micro_batch_rows
        self.forward_s = _of(emulated.forward_s, stage) / rows
        self.backward_s = _of(emulated.backward_s, stage) / rows
        self.update_s = _of(emulated.update_s, stage)
        self._jitter = emulated.jitter
        self._draws = functools.lru_cache(maxsize=1)(functools.partial(jitter_draws, config.seed, stage))

    def drawn(self, index: int) -> float:
        """What the times of micro-batch `index` are multiplied by: from 1 - jitter up to 1 + jitter.

        A function of the seed, the stage and the place in the stream: every run of a config has the same.
        """
        if self._jitter == 0:
            return 1.0
        part, place = divmod(index, NUM_DRAWS)
        return 1 + self._jitter * float(self._draws(part)[place])


@final
class Device:
    """Takes time, one computation after another.

    time ─▶   |── 20 ms ──|late|engine|── 20 ms - late ──|late|engine| ...

    A sleep ends late, by 60 us and on a crowded machine by milliseconds, and a device of its own would not: what one
    computation was late, the next one is shorter, but never below 0. What the engine does between them counts in full.

    Args:
        clock: seconds.
        sleep: returns after so many seconds, or a little later.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._late_s = 0.0

    def take(self, seconds: float) -> None:
        """Return once a computation of `seconds` that begins now would be done."""
        if seconds <= 0:
            return  # no computation: what the last one was late is still to be made up for
        end = self._clock() + max(0.0, seconds - self._late_s)
        while (left := end - self._clock()) > 0:
            self._sleep(left)
        self._late_s = self._clock() - end


@final
class EmulatedStage:
    """A stage that learns nothing and takes its time for it.

    What it hands on are always the same zeros: nobody may write to an activation, so many may be on their way at once.

    Args:
        stage: stands for its weights and counts its updates; computes nothing.
        shape: of one sample of the activation.
        logits_shape: of one sample.
        max_rows: of any micro-batch.
        times: of the stage.
        device: takes them.
    """

    def __init__(
        self,
        stage: Stage,
        shape: tuple[int, ...],
        logits_shape: tuple[int, ...],
        max_rows: int,
        times: Times,
        device: Device,
    ) -> None:
        self._stage = stage
        self._times = times
        self._device = device
        self._activation = torch.zeros(max_rows, *shape)
        self._logits = torch.zeros(max_rows, *logits_shape)
        self._outputs: dict[tuple[int, bool], StageOutput] = {}
        zero = torch.zeros(())
        self._passed = LocalLoss(zero, zero, zero, ())
        self._trained = LocalLoss(torch.zeros((), requires_grad=True), zero, zero, ())
        self._drawn = 1.0

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        rows = micro_batch.num_rows
        self._drawn = self._times.drawn(micro_batch.index)
        self._device.take(self._times.forward_s * rows * self._drawn)
        if (rows, train) not in self._outputs:
            loss = self._trained if train else self._passed
            self._outputs[rows, train] = StageOutput(self._activation[:rows], self._logits[:rows], loss, ())
        return self._outputs[rows, train]

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        seconds = self._times.backward_s * micro_batch.num_rows * self._drawn
        if self._stage.replicas.num_replicas == 1:
            self._device.take(seconds)
            return
        # a replica group adds up as many bytes as it would; half-way through, the gradients are there on average
        self._device.take(seconds / 2)
        began = time.perf_counter()
        zero = torch.stack([(0 * parameter).sum() for _, parameter in self._stage.named_parameters()]).sum()
        self._stage.backward(replace(output, loss=replace(output.loss, total=zero)), micro_batch)
        # what making those zeros took is part of the emulated computation
        self._device.take(max(0.0, seconds / 2 - (time.perf_counter() - began)))

    def update(self) -> None:
        self._stage.complete_gradients()
        self._device.take(self._times.update_s * self._drawn)
        self._stage.num_updates += 1


def _of(value: float | list[float] | None, stage: int) -> float:
    assert value is not None  # the schema's rule
    return value[stage] if isinstance(value, list) else value
