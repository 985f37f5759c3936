"""The peers that backpropagate through the whole network on one worker, or on each with a share of the rows (DDP).

    blocks ─▶ the last stage's head ─▶ one cross-entropy ─▶ backward through everything ─▶ update

The same network, start weights, batches and optimizer as ours; no metrics, hooks or data loader, in their favour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config, ObjectiveConfig
from pipetrgl.engine.end_to_end import Chain
from pipetrgl.errors import ConfigError
from pipetrgl.microbatch import MicroBatch
from pipetrgl.studies.contenders import Seat
from pipetrgl.studies.stage_turns import CPU, InMemory
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.worker import Job, build_stage


def uncut(config: Config, num_parts: int = 1, cuts: Sequence[int] | None = None) -> Config:
    """One loss, at the last head, over as many parts, cut evenly or as told.

    The steps are not divided: `train.accumulate` is of our micro-batches, and torch's schedules have their own.
    """
    objective = {"name": "vangl", "label_smoothing": config.objective.label_smoothing}
    return config.model_copy(
        update={
            "plan": None,
            "model": config.model.model_copy(update={"cuts": "even" if cuts is None else list(cuts)}),
            "pipeline": config.pipeline.model_copy(update={"stages": num_parts}),
            "objective": ObjectiveConfig.model_validate(objective),
            "train": config.train.model_copy(update={"accumulate": 1, "order": "end_to_end"}),
        }
    )


def uncut_job(seat: Seat, num_parts: int = 1, cuts: Sequence[int] | None = None) -> Job:
    """The seat's job for `uncut`."""
    config = uncut(seat.blueprint.config, num_parts, cuts)
    return dataclasses.replace(seat.job, blueprint=draw_up(config, seat.blueprint.spec))


@final
class EndToEnd:
    """The whole network in one process.

    Args:
        num_threads: intra-op threads during a turn; None for those of a worker.
    """

    def __init__(self, seat: Seat, num_threads: int | None) -> None:
        job = uncut_job(seat)
        self._chain = Chain(build_stage(job.blueprint, 0, CPU))
        self._batches = iter(InMemory(job, 0))
        self._own_threads = job.blueprint.config.train.threads
        self._num_threads = num_threads or self._own_threads

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        torch.set_num_threads(self._num_threads)
        watch.mark(0.0, 0)
        for _ in range(num_batches):
            batch = next(self._batches)
            _step(self._chain, self._chain, batch, watch)
            watch.mark(0.0, 0)
        torch.set_num_threads(self._own_threads)

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return self._chain.stage.state()


@final
class DataParallel:
    """The whole network on every worker, each with its share of the rows: torch's DistributedDataParallel over gloo.

    Buffers are not broadcast, and gradients live in the buckets: both in its favour. BatchNorm sees a worker's rows.

    Raises:
        ConfigError: the rows do not divide by the workers.
    """

    def __init__(self, seat: Seat, group: ProcessGroup) -> None:
        job = uncut_job(seat)
        rows, rest = divmod(job.blueprint.config.train.batch, seat.num_workers)
        if rest:
            raise ConfigError(f"train.batch: {rows * seat.num_workers + rest} rows cannot be shared evenly by workers")
        self._rows = range(seat.rank * rows, (seat.rank + 1) * rows)
        self._chain = Chain(build_stage(job.blueprint, 0, CPU))
        self._model = DistributedDataParallel(
            self._chain, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self._batches = iter(InMemory(job, 0))
        gradient_bytes = sum(parameter.nbytes for parameter in self._chain.parameters())
        self._bytes = 2 * (seat.num_workers - 1) * gradient_bytes // seat.num_workers  # what a ring makes each send
        self._sent_bytes = 0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        watch.mark(None, self._sent_bytes)  # its waits are inside of the backward pass
        for _ in range(num_batches):
            batch = next(self._batches)
            _step(self._chain, self._model, batch.share(self._rows), watch)
            self._sent_bytes += self._bytes
            watch.mark(None, self._sent_bytes)

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return self._chain.stage.state()


def images(batch: MicroBatch) -> Tensor:
    """Of a batch of stage 0, (N, C, H, W)."""
    assert isinstance(batch.activation, Tensor)
    return batch.activation


def _step(chain: Chain, model: nn.Module, batch: MicroBatch, watch: Stopwatch) -> None:
    """One step of `model`, which is the chain or a wrapper of it; the loss is the mean over the rows at hand."""
    chain.expect([batch])
    with watch.span("forward"):
        loss = chain.stage.objective.task_loss(model(images(batch)), batch.target)
    with watch.span("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
    with watch.span("update"):
        chain.stage.update()
