"""Our own contenders: a stage in the real loop, on the real links or alone, and all stages in the serial loop."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.contracts import Inbox, NullOutbox, Outbox
from pipetrgl.engine import loop
from pipetrgl.engine.metrics import Row
from pipetrgl.engine.phases import Parallel
from pipetrgl.engine.saving import SaveCheckpoints
from pipetrgl.engine.trace import Trace, TracedInbox, TracedOutbox, TracedStage
from pipetrgl.launchers import serial
from pipetrgl.launchers.store_links import StoreLinks
from pipetrgl.microbatch import MicroBatch
from pipetrgl.seeds import torch_stream
from pipetrgl.stage import Stage, StageOutput
from pipetrgl.studies.contenders import Seat
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, build_trainee, with_images

CPU = torch.device("cpu")
NUM_IN_MEMORY = 4
"""Batches that lie in memory, used again and again."""


@final
class Portions:
    """An inbox in portions: each iteration gives the micro-batches of `num_batches` more and leaves the stream open."""

    def __init__(self, inbox: Inbox) -> None:
        self.num_batches = 0
        self._inbox = inbox
        self._stream = iter(inbox)

    @property
    def waited_s(self) -> float:
        return self._inbox.waited_s

    def __iter__(self) -> Iterator[MicroBatch]:
        closed = 0
        while closed < self.num_batches:
            micro_batch = next(self._stream)
            closed += micro_batch.closes_step
            yield micro_batch
            del micro_batch

    def close(self) -> None:
        pass


@final
class StaysOpen:
    """An outbox that outlives a turn."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    @property
    def waited_s(self) -> float:
        return self._outbox.waited_s

    @property
    def sent_bytes(self) -> int:
        return self._outbox.sent_bytes

    @property
    def received_index(self) -> int:
        return self._outbox.received_index

    def send(self, micro_batch: MicroBatch) -> None:
        self._outbox.send(micro_batch)

    def close(self) -> None:
        pass


@final
class InMemory:
    """An endless inbox of the first few batches of a run, with a stage's inputs; their values do not change the time.

    Of stage 0 these are the run's own; of a later one random and not negative, as behind a ReLU.
    """

    waited_s = 0.0

    def __init__(self, job: Job, stage: int) -> None:
        self._micro_batches: list[MicroBatch] = []
        shape, generator = job.blueprint.input_shape(stage), torch_stream(job.blueprint.config.seed, "turns", stage)
        with build_loader(job) as loader:
            for micro_batch in loader:
                if stage > 0:
                    activation = torch.randn(micro_batch.num_rows, *shape, generator=generator).relu_()
                    micro_batch = micro_batch.carrying(activation)
                self._micro_batches.append(micro_batch)
                if micro_batch.closes_step and micro_batch.step == NUM_IN_MEMORY - 1:
                    break

    def __iter__(self) -> Iterator[MicroBatch]:
        steps = itertools.count()
        while True:
            step = -1
            for micro_batch in self._micro_batches:
                if micro_batch.step != step:
                    step, now = micro_batch.step, next(steps)
                yield dataclasses.replace(micro_batch, step=now)

    def close(self) -> None:
        pass


@final
class StageTurns:
    """One stage in the engine's loop, with the hooks of a real run."""

    def __init__(self, seat: Seat, stage: Stage, inbox: Inbox, outbox: Outbox) -> None:
        self._job = seat.job
        self._rank = seat.rank
        self._stage = stage
        self._inbox = Portions(inbox)
        self._outbox = StaysOpen(outbox)
        self._step = 0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        inbox, outbox = self._inbox, self._outbox
        inbox.num_batches = num_batches
        trace = Trace(self._step, num_batches, self._rank, "", 0.0)
        stage = TracedStage(build_trainee(self._job, self._stage), trace)
        hooks = [*_hooks(self._job, self._stage, inbox, outbox), _Lap(watch, inbox, outbox)]
        loop.run(stage, TracedInbox(inbox, trace), TracedOutbox(outbox, trace), Parallel(), hooks)
        watch.add_events(trace.events(), self._step)
        self._step += num_batches

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return self._stage.state()


@final
class SerialTurns:
    """All stages in the serial launcher's loop, with the hooks of a real run."""

    def __init__(self, seat: Seat) -> None:
        self._job = seat.job
        self._stages = [build_stage(seat.blueprint, index, CPU) for index in range(seat.blueprint.num_stages)]
        self._inbox = Portions(InMemory(seat.job, 0))
        self._step = 0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        self._inbox.num_batches = num_batches
        trace = Trace(self._step, num_batches, 0, "", 0.0)
        trainees = [TracedStage(build_trainee(self._job, stage), trace) for stage in self._stages]
        hooks = [_hooks(self._job, stage, self._inbox, NullOutbox()) for stage in self._stages]
        hooks[-1].append(_Lap(watch, self._inbox, NullOutbox()))
        codec = CODECS[self._job.blueprint.config.channel.codec]
        serial.run(trainees, self._inbox, Parallel(), codec, hooks)
        watch.add_events(trace.events(), self._step)
        self._step += num_batches

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return {name: tensor for stage in self._stages for name, tensor in stage.state().items()}


def pipelined(seat: Seat) -> StageTurns:
    """Our pipeline: stage 0 reads from the data loader, the others from their links, which stay open."""
    stage = build_stage(seat.blueprint, seat.rank, CPU)
    links = StoreLinks(seat.job, seat.member, seat.board, Alarm())
    place = seat.member.place
    inbox = build_loader(seat.job) if seat.rank == 0 else links.inbox(place)
    return StageTurns(seat, stage, inbox, with_images(seat.blueprint, place.stage, links.outbox(place), CPU))


def unlinked(seat: Seat) -> StageTurns:
    """This worker's stage on micro-batches that lie in memory."""
    stage = build_stage(seat.blueprint, seat.rank, CPU)
    return StageTurns(seat, stage, InMemory(seat.job, seat.rank), NullOutbox())


@final
class _Lap:
    """The hook that marks the end of each batch; made when the turn begins."""

    def __init__(self, watch: Stopwatch, inbox: Inbox, outbox: Outbox) -> None:
        self._watch = watch
        self._inbox = inbox
        self._outbox = outbox
        self._mark()

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if micro_batch.closes_step:
            self._mark()

    def close(self) -> None:
        pass

    def _mark(self) -> None:
        self._watch.mark(self._inbox.waited_s + self._outbox.waited_s, self._outbox.sent_bytes)


def _hooks(job: Job, stage: Stage, inbox: Inbox, outbox: Outbox) -> list[loop.Hook]:
    """Those of a real run, but the saving one: the end of a turn is not the end of the stream."""
    hooks = build_hooks(job, stage, inbox, outbox, _drop)
    return [hook for hook in hooks if not isinstance(hook, SaveCheckpoints)]


def _drop(row: Row) -> None:
    """Metrics are computed as in a real run, and not kept."""
