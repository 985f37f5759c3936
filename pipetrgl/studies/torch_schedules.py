"""The peers that pipeline and backpropagate: torch.distributed.pipelining's schedules over the crew's workers.

    gpipe, 1f1b            one part of the network a worker     rank 0: part 0      rank 1: part 1
    interleaved_1f1b,      two parts a worker, in a loop        rank 0: parts 0, 2  rank 1: parts 1, 3
    zero_bubble
    zero_bubble_v          two parts a worker, in a V           rank 0: parts 0, 3  rank 1: parts 1, 2

The parts are cut by the measured cost of the blocks, with the one head. BatchNorm sees micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, final

import torch
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

from pipetrgl.blueprint import Blueprint
from pipetrgl.channels.alarm import Alarm
from pipetrgl.errors import ConfigError
from pipetrgl.partition import balanced_counts, partition
from pipetrgl.studies.contenders import Seat
from pipetrgl.studies.end_to_end import Chain, Learner, cross_entropy, images, uncut_job
from pipetrgl.studies.profile import profile
from pipetrgl.studies.stage_turns import CPU, InMemory
from pipetrgl.studies.stopwatch import Stopwatch

_REPEATS = 5
_KINDS: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}


@final
class _TimedStage(PipelineStage):
    """A stage of torch's whose computations are spans and whose sends are counted."""

    watch: Stopwatch
    sent_bytes = 0

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


@final
class TorchSchedule:
    """This worker's part in one of torch's schedules.

    Args:
        seat: this worker's.
        kind: key of the table above.
        num_micro_batches: M, of each batch.
        group: of all workers, for this contender alone.
    Raises:
        ConfigError: the rows do not divide by M.
        ModelError: the network has fewer blocks than parts are needed.
        ValueError: torch's, of an M that the schedule does not take.
    """

    def __init__(self, seat: Seat, kind: str, num_micro_batches: int, group: ProcessGroup) -> None:
        job = uncut_job(seat)
        blueprint = self._blueprint = job.blueprint
        batch, workers, rank = blueprint.config.train.batch, seat.num_workers, seat.rank
        self._rows, rest = divmod(batch, num_micro_batches)
        if rest:
            raise ConfigError(f"train.batch: {batch} rows cannot make {num_micro_batches} equal micro-batches")
        single = kind in ("gpipe", "1f1b")
        mine = [rank] if single else [rank, 2 * workers - 1 - rank if kind == "zero_bubble_v" else rank + workers]
        ranges = _parts(seat, blueprint, workers if single else 2 * workers)
        self._chains = [Chain(blueprint, ranges[part]) for part in mine]
        self._stages = [
            _timed_stage(blueprint, chain, ranges, part, self._rows, group)
            for chain, part in zip(self._chains, mine, strict=True)
        ]
        self._schedule = _KINDS[kind](
            self._stages[0] if single else self._stages, n_microbatches=num_micro_batches, loss_fn=self._loss
        )
        self._first, self._last = 0 in mine, len(ranges) - 1 in mine
        self._learner = Learner(blueprint, self._chains)
        self._batches = iter(InMemory(job, 0))
        self._waited_s = 0.0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        self._watch = watch
        for stage in self._stages:
            stage.watch = watch
        self._mark()
        for _ in range(num_batches):
            batch = next(self._batches)
            for chain in self._chains:
                chain.reseed(self._learner.step, self._rows)
            inputs = (images(batch),) if self._first else ()
            target = batch.target if self._last else None
            step = functools.partial(self._schedule.step, *inputs, target=target, return_outputs=False)
            self._waited_s += watch.call("wait", step)
            with watch.span("update"):
                self._learner.update()
            self._mark()

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers of this worker's parts by network name."""
        return {name: tensor for chain in self._chains for name, tensor in chain.state().items()}

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with self._watch.span("forward"):
            return cross_entropy(self._blueprint, logits, target)

    def _mark(self) -> None:
        self._watch.mark(self._waited_s, sum(stage.sent_bytes for stage in self._stages))


def post_unit_costs(seat: Seat) -> None:
    """Measure what every unit of blocks costs end to end, and tell all workers; one of them does."""
    blueprint = uncut_job(seat).blueprint
    units = profile(blueprint.config, blueprint.spec, _REPEATS).units
    costs = [(unit.inner if number else unit.opening).total_s for number, unit in enumerate(units)]
    costs[-1] += units[-1].head.total_s
    seat.board.post("unit costs", costs)


def _parts(seat: Seat, blueprint: Blueprint, num_parts: int) -> tuple[range, ...]:
    """The blocks of each part, the most expensive as cheap as possible."""
    what = "worker 0 to measure the costs of the blocks"
    costs: list[float] = seat.board.read("unit costs", blueprint.config.channel.wait_timeout_s, Alarm(), what)
    counts = balanced_counts(costs, num_parts) if num_parts <= len(costs) else "even"  # which then says why not
    return partition(blueprint.network.blocks, num_parts, counts, blueprint.num_parameters)


def _timed_stage(
    blueprint: Blueprint, chain: Chain, ranges: Sequence[range], part: int, rows: int, group: ProcessGroup
) -> _TimedStage:
    # Shapes are given, not inferred: inference would run the module on memory that nobody has written, and spoil the
    # statistics of BatchNorm. An input that asks for no gradient would get none sent back.
    first, last = part == 0, part == len(ranges) - 1
    input_shape = blueprint.network.input_shape if first else blueprint.shapes[ranges[part].start - 1]
    input_dtype = blueprint.network.input_dtype if first else torch.float32
    output_shape = blueprint.logits_shape if last else blueprint.shapes[ranges[part].stop - 1]
    return _TimedStage(
        chain,
        part,
        len(ranges),
        CPU,
        input_args=torch.empty(rows, *input_shape, dtype=input_dtype, requires_grad=not first),
        output_args=torch.empty(rows, *output_shape, requires_grad=True),
        group=group,
    )
