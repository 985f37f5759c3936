"""End-to-end training over workers: torch.distributed.pipelining's schedules, a stage of the network on each worker.

           time ─▶                                1F1B, M = 3
stage 0    F0 F1       B0 F2       B1     B2      F: a micro-batch's forward, then its activation goes on
stage 1       F0 B0 F1    B1 F2 B2                B: its backward, then its gradient goes back

Nothing is divided or sent by the engine's loop: it sees one step at a time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from pipetrgl.channels.contracts import Inbox
from pipetrgl.channels.link import LostPeerError
from pipetrgl.config.schema import TrainConfig
from pipetrgl.engine.end_to_end import Chain, OneLoss, divided, scored, unscored
from pipetrgl.engine.pulse import Pulse
from pipetrgl.engine.trace import Trace
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput

Shape = tuple[int, ...]

KINDS: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}


class Watch(Protocol):
    """Sees what a worker computes, as opposed to its waits."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Around a "forward", "backward" or "update"."""


@final
class WatchedStage(PipelineStage):
    """A stage of torch's whose computations are watched and whose sends are counted.

    Shapes are given, not inferred: inference would run the module on memory that nobody has written, and spoil the
    statistics of BatchNorm.

    Args:
        chain: what it computes.
        part, num_parts: its place in the network.
        shapes: of one row that comes in, and of one that goes out.
        dtype: of what comes in.
        rows: of a micro-batch.
        group: of all workers.
    """

    watch: Watch

    def __init__(
        self,
        chain: Chain,
        part: int,
        num_parts: int,
        shapes: tuple[Shape, Shape],
        dtype: torch.dtype,
        rows: int,
        group: ProcessGroup,
    ) -> None:
        # an input that asks for no gradient would get none sent back
        args = torch.empty(rows, *shapes[0], dtype=dtype, requires_grad=part > 0)
        outputs = torch.empty(rows, *shapes[1], requires_grad=True)
        device = chain.stage.device
        super().__init__(chain, part, num_parts, device, input_args=args, output_args=outputs, group=group)
        self.sent_bytes = 0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.span("forward"):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.span("backward"):
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.span("backward"):
            return super().backward_weight_one_chunk(*args, **kwargs)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, sends: list[P2POp]) -> list[P2POp]:
        self.sent_bytes += sum(send.tensor.nbytes for send in sends)
        return sends


def schedule(kind: str, stages: list[WatchedStage], num_micro_batches: int, loss: OneLoss) -> Any:
    """One of `KINDS` over this worker's stages, one or two; the loss weighs the micro-batches itself.

    Raises:
        ValueError: torch's, of a number of micro-batches that the schedule does not take.
    """

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        with stages[-1].watch.span("forward"):
            return loss(logits, target)

    mine = stages if len(stages) > 1 else stages[0]
    return KINDS[kind](mine, n_microbatches=num_micro_batches, loss_fn=watched, scale_grads=False)


@final
class Worked:
    """Watches a worker for its pulse, its trace, and the time that it does not wait."""

    def __init__(self, pulse: Pulse, trace: Trace) -> None:
        self._pulse = pulse
        self._trace = trace
        self.batch: MicroBatch | None = None
        self.computed_s = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        assert self.batch is not None
        start = time.perf_counter()
        self._pulse.begin(f"step {self.batch.step}: {name}")
        yield
        self._pulse.end()
        self.computed_s += time.perf_counter() - start
        self._trace.add(name, "compute", self.batch, start)


@final
class Scheduled:
    """One worker's stage, to the loop like any other; both passes of a step, with their waits, are in its `forward`.

    Args:
        chain: the stage.
        num_stages: as many as workers, whose ranks are the stages.
        shapes: of one row that comes in, and of one that goes out.
        dtype: of what comes in.
        train: schedule and micro-batches.
        group: of all workers.
        watch: of this one.

    Attributes:
        waited_s: time for which the stage waited for others.
    """

    def __init__(
        self,
        chain: Chain,
        num_stages: int,
        shapes: tuple[Shape, Shape],
        dtype: torch.dtype,
        train: TrainConfig,
        group: ProcessGroup,
        watch: Worked,
    ) -> None:
        self.waited_s = 0.0
        self._chain = chain
        self._train = train
        self._watch = watch
        self._group = group
        self._input_shape = shapes[0]
        self._first, self._last = self.index == 0, self.index == num_stages - 1
        self._loss = OneLoss(chain.stage)
        rows = train.batch // train.accumulate
        self._part = WatchedStage(chain, self.index, num_stages, shapes, dtype, rows, group)
        self._part.watch = watch
        self._schedule = schedule(train.schedule, [self._part], train.accumulate, self._loss)
        self._passed_bytes = 0

    @property
    def index(self) -> int:
        return self._chain.stage.index

    @property
    def sent_bytes(self) -> int:
        """Activations and gradients."""
        return self._part.sent_bytes + self._passed_bytes

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        self._watch.batch = micro_batch
        self._chain.train(train)
        self._chain.expect(divided(micro_batch, self._train) if train else [micro_batch])
        start, computed_s = time.perf_counter(), self._watch.computed_s
        with _lost_if_broken():
            output = self._step(micro_batch) if train else self._pass(micro_batch)
        self.waited_s += time.perf_counter() - start - (self._watch.computed_s - computed_s)
        return output

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        """Done."""

    def update(self) -> None:
        with self._watch.span("update"):
            self._chain.stage.update()

    def _step(self, batch: MicroBatch) -> StageOutput:
        self._loss.begin(batch)
        inputs = (batch.activation,) if self._first else ()
        self._schedule.step(*inputs, target=batch.target if self._last else None, return_outputs=False)
        return self._loss.output() if self._last else unscored(batch, trained=True)

    @torch.no_grad()
    def _pass(self, batch: MicroBatch) -> StageOutput:
        """An evaluation: any number of rows, forward only, so that the next worker's pass overlaps with the next one
        here."""
        x = batch.activation
        if not self._first:
            x = torch.empty(batch.num_rows, *self._input_shape)
            dist.recv(x, self.index - 1, self._group)
        with self._watch.span("forward"):
            x = self._chain(x)
        if self._last:
            return scored(x)
        dist.send(x.contiguous(), self.index + 1, self._group)
        self._passed_bytes += x.nbytes
        return unscored(batch, trained=False)


@final
class Steps:
    """The inbox of a scheduled stage: the same steps on every worker, and the waits of the schedule."""

    def __init__(self, steps: Inbox, stage: Scheduled) -> None:
        self._steps = steps
        self._stage = stage

    @property
    def waited_s(self) -> float:
        return self._steps.waited_s + self._stage.waited_s

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._steps)

    def close(self) -> None:
        self._steps.close()


@final
class Sent:
    """The outbox of a scheduled stage: the schedule has sent what there is to send."""

    waited_s = 0.0

    def __init__(self, stage: Scheduled) -> None:
        self._stage = stage

    @property
    def sent_bytes(self) -> int:
        return self._stage.sent_bytes

    @property
    def received_index(self) -> int:
        return sys.maxsize  # nobody is replaced alone

    def send(self, micro_batch: MicroBatch) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def _lost_if_broken() -> Iterator[None]:
    """Torch's schedules and gloo say everything with a RuntimeError; only gloo's mean that another worker is lost."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise LostPeerError(f"the end-to-end pipeline broke: {str(error).splitlines()[0]}") from error
