"""The peers that pipeline and backpropagate: torch.distributed.pipelining's schedules over the crew's workers.

    gpipe, 1f1b            one part of the network a worker     rank 0: part 0      rank 1: part 1
    interleaved_1f1b,      two parts a worker, in a loop        rank 0: parts 0, 2  rank 1: parts 1, 3
    zero_bubble
    zero_bubble_v          two parts a worker, in a V           rank 0: parts 0, 3  rank 1: parts 1, 2

The parts are cut by the measured cost of the blocks, with the one head. BatchNorm sees micro-batches.
"""

from __future__ import annotations

import functools
from typing import final

from torch import Tensor
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.engine.end_to_end import Chain, OneLoss, divided
from pipetrgl.engine.schedules import WatchedStage, schedule
from pipetrgl.errors import ConfigError
from pipetrgl.partition import balanced_counts
from pipetrgl.studies.contenders import Seat
from pipetrgl.studies.end_to_end import images, uncut_job
from pipetrgl.studies.profile import profile
from pipetrgl.studies.stage_turns import CPU, InMemory
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.worker import build_stage

_REPEATS = 5


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
        workers, rank = seat.num_workers, seat.rank
        single = kind in ("gpipe", "1f1b")
        parts = workers if single else 2 * workers
        mine = [rank] if single else [rank, 2 * workers - 1 - rank if kind == "zero_bubble_v" else rank + workers]
        job = uncut_job(seat, parts, _cuts(seat, parts))
        blueprint, batch = job.blueprint, job.blueprint.config.train.batch
        rows, rest = divmod(batch, num_micro_batches)
        if rest:
            raise ConfigError(f"train.batch: {batch} rows cannot make {num_micro_batches} equal micro-batches")
        self._chains = [Chain(build_stage(blueprint, part, CPU)) for part in mine]
        self._stages = [
            WatchedStage(chain, part, parts, blueprint.shapes_of(part), blueprint.input_dtype(part), rows, group)
            for chain, part in zip(self._chains, mine, strict=True)
        ]
        self._first, self._last = 0 in mine, parts - 1 in mine
        self._loss = OneLoss(self._chains[-1].stage)
        self._schedule = schedule(kind, self._stages, num_micro_batches, self._loss)
        self._train = blueprint.config.train.model_copy(update={"accumulate": num_micro_batches})
        self._batches = iter(InMemory(job, 0))
        self._waited_s = 0.0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        for stage in self._stages:
            stage.watch = watch
        self._mark(watch)
        for _ in range(num_batches):
            batch = next(self._batches)
            self._loss.begin(batch)
            for chain in self._chains:
                chain.expect(divided(batch, self._train))
            inputs = (images(batch),) if self._first else ()
            target = batch.target if self._last else None
            step = functools.partial(self._schedule.step, *inputs, target=target, return_outputs=False)
            self._waited_s += watch.call("wait", step)
            with watch.span("update"):
                for chain in self._chains:
                    chain.stage.update()
            self._mark(watch)

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers of this worker's parts by network name."""
        return {name: tensor for chain in self._chains for name, tensor in chain.stage.state().items()}

    def _mark(self, watch: Stopwatch) -> None:
        watch.mark(self._waited_s, sum(stage.sent_bytes for stage in self._stages))


def post_unit_costs(seat: Seat) -> None:
    """Measure what every unit of blocks costs end to end, and tell all workers; one of them does."""
    blueprint = uncut_job(seat).blueprint
    units = profile(blueprint.config, blueprint.spec, _REPEATS).units
    costs = [(unit.inner if number else unit.opening).total_s for number, unit in enumerate(units)]
    costs[-1] += units[-1].head.total_s
    seat.board.post("unit costs", costs)


def _cuts(seat: Seat, num_parts: int) -> list[int] | None:
    """The blocks of each part, the most expensive as cheap as possible."""
    what = "worker 0 to measure the costs of the blocks"
    costs: list[float] = seat.board.read("unit costs", seat.blueprint.config.channel.wait_timeout_s, Alarm(), what)
    return balanced_counts(costs, num_parts) if num_parts <= len(costs) else None  # then the even cuts say why not
