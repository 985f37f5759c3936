"""The peers that backpropagate through the whole network on one worker, or on each with a share of the rows (DDP).

    blocks ─▶ the last stage's head ─▶ one cross-entropy ─▶ backward through everything ─▶ update

The same network, start weights, batches and optimizer as ours; no metrics, hooks or data loader, in their favour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from pipetrgl import optim
from pipetrgl.blocks import BlockSpec
from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.schema import Config, ObjectiveConfig
from pipetrgl.errors import ConfigError
from pipetrgl.microbatch import MicroBatch
from pipetrgl.models import stochastic
from pipetrgl.objective import cross_entropy as cross_entropy_of
from pipetrgl.seeds import derive
from pipetrgl.studies.contenders import Seat
from pipetrgl.studies.stage_turns import CPU, InMemory
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.worker import Job, build_stage


def uncut(config: Config) -> Config:
    """One stage and no transport cost: what backpropagation through the whole network trains.

    The steps are not divided: `train.accumulate` is of our micro-batches, and torch's schedules have their own.
    """
    objective = ObjectiveConfig.model_validate(
        {
            "name": "vangl",
            "label_smoothing": config.objective.label_smoothing,
            "transport": {"impl": "autograd"},  # no block computes a mean square that nobody wants
        }
    )
    return config.model_copy(
        update={
            "plan": None,
            "model": config.model.model_copy(update={"cuts": "even"}),
            "pipeline": config.pipeline.model_copy(update={"stages": 1}),
            "objective": objective,
            "train": config.train.model_copy(update={"accumulate": 1}),
        }
    )


@final
class Chain(nn.Module):
    """Consecutive blocks of a network as an ordinary module, tensor in and tensor out; the last one with its head.

    Start weights are those of a run: a function of (seed, block name).
    """

    def __init__(self, blueprint: Blueprint, blocks: range) -> None:
        super().__init__()
        stage = build_stage(blueprint, 0, CPU)
        self._specs: Sequence[BlockSpec] = stage.specs[blocks.start : blocks.stop]
        self._seed = blueprint.config.seed
        self.blocks = nn.ModuleList(stage.blocks[blocks.start : blocks.stop])
        self.head = stage.head if blocks.stop == len(stage.specs) else None
        self._head_prefix = f"heads.{stage.last_block}."

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) as the first block takes it, to the last block's activation, or to logits (N, classes)."""
        for block in self.blocks:
            x = block(x).activation
        return x if self.head is None else self.head(x)

    def reseed(self, step: int, num_rows: int) -> None:
        """Choose the masks of dropout for inputs of so many rows."""
        for spec, block in zip(self._specs, self.blocks, strict=True):
            stochastic.reseed(block, derive(self._seed, "dropout", spec.name, step), 0, num_rows)

    def prefixed(self) -> Iterator[tuple[str, nn.Module]]:
        """Blocks and head by state-dict prefix, as in our checkpoints."""
        yield from ((spec.prefix, block) for spec, block in zip(self._specs, self.blocks, strict=True))
        if self.head is not None:
            yield self._head_prefix, self.head

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return {
            prefix + name: tensor for prefix, module in self.prefixed() for name, tensor in module.state_dict().items()
        }


@final
class Learner:
    """The optimizer over chains, at the config's rates."""

    def __init__(self, blueprint: Blueprint, chains: Sequence[Chain]) -> None:
        self.step = 0
        self._blueprint = blueprint
        named = [
            (prefix + name, parameter)
            for chain in chains
            for prefix, module in chain.prefixed()
            for name, parameter in module.named_parameters()
        ]
        self._optimizer = optim.build(blueprint.config.optim, named)

    def update(self) -> None:
        itinerary = self._blueprint.itinerary
        rate = optim.learning_rate(
            self._blueprint.config.optim, self.step, itinerary.steps_per_epoch, itinerary.total_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1


def uncut_job(seat: Seat) -> Job:
    """The seat's job for `uncut`."""
    return dataclasses.replace(seat.job, blueprint=draw_up(uncut(seat.blueprint.config), seat.blueprint.spec))


def cross_entropy(blueprint: Blueprint, logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows and tokens, with the config's label smoothing."""
    return cross_entropy_of(logits, target, blueprint.config.objective.label_smoothing)


@final
class EndToEnd:
    """The whole network in one process.

    Args:
        num_threads: intra-op threads during a turn; None for those of a worker.
    """

    def __init__(self, seat: Seat, num_threads: int | None) -> None:
        job = uncut_job(seat)
        self._blueprint = job.blueprint
        self._chain = Chain(job.blueprint, job.blueprint.ranges[0])
        self._learner = Learner(job.blueprint, [self._chain])
        self._batches = iter(InMemory(job, 0))
        self._num_threads = num_threads or job.blueprint.config.train.threads

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        torch.set_num_threads(self._num_threads)
        watch.mark(0.0, 0)
        for _ in range(num_batches):
            batch = next(self._batches)
            self._chain.reseed(self._learner.step, batch.num_rows)
            _step(self._blueprint, self._chain, self._learner, images(batch), batch.target, watch)
            watch.mark(0.0, 0)
        torch.set_num_threads(self._blueprint.config.train.threads)

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return self._chain.state()


@final
class DataParallel:
    """The whole network on every worker, each with its share of the rows: torch's DistributedDataParallel over gloo.

    Buffers are not broadcast, and gradients live in the buckets: both in its favour. BatchNorm sees a worker's rows.

    Raises:
        ConfigError: the rows do not divide by the workers.
    """

    def __init__(self, seat: Seat, group: ProcessGroup) -> None:
        job = uncut_job(seat)
        self._blueprint = job.blueprint
        rows, rest = divmod(job.blueprint.config.train.batch, seat.num_workers)
        if rest:
            raise ConfigError(f"train.batch: {rows * seat.num_workers + rest} rows cannot be shared evenly by workers")
        self._rows = slice(seat.rank * rows, (seat.rank + 1) * rows)
        self._chain = Chain(job.blueprint, job.blueprint.ranges[0])
        self._model = DistributedDataParallel(
            self._chain, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self._learner = Learner(job.blueprint, [self._chain])
        self._batches = iter(InMemory(job, 0))
        gradient_bytes = sum(parameter.nbytes for parameter in self._chain.parameters())
        self._bytes = 2 * (seat.num_workers - 1) * gradient_bytes // seat.num_workers  # what a ring makes each send
        self._sent_bytes = 0

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        watch.mark(None, self._sent_bytes)  # its waits are inside of the backward pass
        for _ in range(num_batches):
            batch = next(self._batches)
            x, target = images(batch)[self._rows], batch.target[self._rows]
            self._chain.reseed(self._learner.step, len(target))
            _step(self._blueprint, self._model, self._learner, x, target, watch)
            self._sent_bytes += self._bytes
            watch.mark(None, self._sent_bytes)

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name."""
        return self._chain.state()


def images(batch: MicroBatch) -> Tensor:
    """Of a batch of stage 0, (N, C, H, W)."""
    assert isinstance(batch.activation, Tensor)
    return batch.activation


def _step(
    blueprint: Blueprint, model: nn.Module, learner: Learner, x: Tensor, target: Tensor, watch: Stopwatch
) -> None:
    with watch.span("forward"):
        loss = cross_entropy(blueprint, model(x), target)
    with watch.span("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
    with watch.span("update"):
        learner.update()
