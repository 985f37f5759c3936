"""The blueprint of a run: everything that follows from config and data before any device is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from pipetrgl import optim
from pipetrgl.blocks import BlockSpec, Network
from pipetrgl.config.load import config_hash
from pipetrgl.config.planned import read_plan
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.seen import NothingSeen, Seen, SeenInPhase
from pipetrgl.errors import ModelError
from pipetrgl.models import heads, zoo
from pipetrgl.models.batchnorm import BatchNorm2d
from pipetrgl.objective import stage_taus
from pipetrgl.objectives import table
from pipetrgl.objectives.contract import StageFacts
from pipetrgl.partition import partition
from pipetrgl.stability import certain_limit
from pipetrgl.world import World

Shapes = tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True)
class Blueprint:
    """The same on every worker, which then builds only its own stage.

    Attributes:
        config: validated.
        spec: sizes and shapes of the data set, from the worker that reads it.
        network: all blocks, unbuilt.
        ranges: block indices of each stage.
        shapes: output shape of each block, without rows.
        num_parameters: of each block.
    """

    config: Config
    spec: DataSpec
    network: Network
    ranges: tuple[range, ...]
    shapes: Shapes
    num_parameters: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """What another process needs beside the config to draw it up again, as JSON has it."""
        return {"spec": self.spec.to_dict(), "shapes": self.shapes}

    @property
    def num_stages(self) -> int:
        return len(self.ranges)

    @property
    def world(self) -> World:
        return World(self.config.pipeline.replica_counts)

    @cached_property
    def config_hash(self) -> str:
        return config_hash(self.config)

    @cached_property
    def itinerary(self) -> Itinerary:
        config, train = self.config, self.config.train
        if self.end_to_end:  # whole steps travel, and are divided where they are computed
            train = train.model_copy(update={"accumulate": 1})
        return Itinerary(train, config.evaluate, self.spec, self.num_stages, config.pipeline.least_rows)

    @property
    def end_to_end(self) -> bool:
        """Whether gradients go through all stages, and only the last one has a head."""
        return self.config.train.order == "end_to_end"

    def has_head(self, stage: int) -> bool:
        return not self.end_to_end or stage == self.num_stages - 1

    @cached_property
    def taus(self) -> tuple[float, ...]:
        return stage_taus(self.config.objective.transport, self.num_stages)

    def blocks(self, stage: int) -> tuple[BlockSpec, ...]:
        return tuple(self.network.blocks[index] for index in self.ranges[stage])

    def input_shape(self, stage: int) -> tuple[int, ...]:
        """Of one sample as the stage receives it."""
        first = self.ranges[stage].start
        return self.shapes[first - 1] if first > 0 else self.network.input_shape

    def output_shape(self, stage: int) -> tuple[int, ...]:
        """Of one sample as the stage hands it on, and as its head receives it."""
        return self.shapes[self.ranges[stage].stop - 1]

    def image_shape(self, stage: int) -> tuple[int, ...] | None:
        """Of the image that a training micro-batch brings the stage beside its input; None: it brings none."""
        needs_it = self.config.objective.needs_images and 0 < stage < self.num_stages - 1
        return self.network.input_shape if needs_it else None

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Of one sample, of every head."""
        return (*self.network.target_shape, self.network.num_classes)

    def draw_input(self, stage: int, rows: int, generator: torch.Generator) -> torch.Tensor:
        """What a stage could receive: normally distributed numbers, or any tokens."""
        shape = (rows, *self.input_shape(stage))
        if stage == 0 and self.network.reads_tokens:
            return torch.randint(self.network.num_classes, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def input_dtype(self, stage: int) -> torch.dtype:
        """Of what the stage receives."""
        return self.network.input_dtype if stage == 0 else torch.float32

    def shapes_of(self, stage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one sample as the stage receives it, and as it leaves end to end: logits behind the last head."""
        last = stage == self.num_stages - 1
        return self.input_shape(stage), self.logits_shape if last else self.output_shape(stage)

    def head(self, stage: int) -> torch.nn.Module:
        """A fresh auxiliary head, not initialised."""
        if not self.has_head(stage):
            return heads.NoHead()
        config = self.config.model.head
        return heads.build(config.name, config.pool, self.output_shape(stage), self.spec.num_classes)

    def criterion(self, stage: int) -> torch.nn.Module:
        """What the objective makes of the stage's task loss, fresh; layers of its own are not initialised."""
        facts = StageFacts(
            stage=stage,
            num_stages=self.num_stages,
            came_in=self.input_shape(stage),
            hands_on=self.output_shape(stage),
            image=self.network.input_shape,
            mean=self.spec.mean,
            std=self.spec.std,
            num_classes=self.spec.num_classes,
        )
        return table.build(self.config.objective, facts)

    def stage_parameters(self, stage: int) -> tuple[int, int]:
        """Parameters of the blocks, and of the head with the layers of the criterion."""
        with torch.device("meta"):
            extra = self.head(stage), self.criterion(stage)
            head = sum(parameter.numel() for module in extra for parameter in module.parameters())
        return sum(self.num_parameters[index] for index in self.ranges[stage]), head

    def updates(self, num_taken: int) -> dict[str, int]:
        """Each stage's own number of updates after the run's first `num_taken` steps, by the name of its first block.

        Empty where all stages learn in every step: all of them are `num_taken`, and the cuts need not be told.
        """
        if not self.config.train.one_by_one:
            return {}
        own = self.itinerary.sweep.num_updates
        return {self.blocks(stage)[0].name: own(stage, num_taken) for stage in range(self.num_stages)}

    def seen(self, first_step: int) -> Seen:
        """What the learning stage recalls in a stream that begins with `first_step`."""
        if self.config.train.cache == "none":
            return NothingSeen()
        return SeenInPhase(self.itinerary, self.config.seed, self.spec.num_train, first_step)

    def cache_bytes(self, stage: int) -> int:
        """What `train.cache` keeps of a stage's input while it learns, in memory or on disk; float32."""
        seen, phases = self.seen(0), self.itinerary.sweep.phases
        if not any(seen.again(phase.steps.start) for phase in phases if stage in phase.learners):
            return 0
        return self.spec.num_train * math.prod(self.input_shape(stage)) * torch.float32.itemsize

    @property
    def max_rows(self) -> int:
        """Of the largest micro-batch in the stream."""
        evaluate = self.config.evaluate
        rows = [self.config.train.micro_batch_rows]
        if evaluate.valid_every > 0 or evaluate.at_start:
            rows.append(min(evaluate.batch, self.spec.num_valid))
        if evaluate.test_at_end:
            rows.append(min(evaluate.batch, self.spec.num_test))
        return max(rows)


def draw_up(config: Config, spec: DataSpec) -> Blueprint:
    """Build the plan of a run and check all that can be checked without training.

    Raises:
        ModelError: no such model, an illegal cut, a head that does not fit, or a transport cost that is undefined
            or certain to diverge.
        ConfigError: the cuts come from a plan of another network.
        DataError: the training split is too small for one step.
    """
    return _drawn_up(config, spec, zoo.output_shapes)


def draw_up_again(config: Config, facts: dict[str, Any]) -> Blueprint:
    """The plan that another process has drawn up, from its `Blueprint.facts`.

    To find shapes torch imports its compiler, for a second that no worker has to spend.
    """
    shapes = tuple(tuple(shape) for shape in facts["shapes"])
    return _drawn_up(config, DataSpec.from_dict(facts["spec"]), lambda network: shapes)


def _drawn_up(config: Config, spec: DataSpec, find_shapes: Callable[[Network], Shapes]) -> Blueprint:
    # end to end, no block shall compute a mean square that nobody reads
    impl = "autograd" if config.train.order == "end_to_end" else config.objective.transport.impl
    network = zoo.build(config.model, spec.sample_shape, spec.num_classes, impl)
    if config.plan is not None:
        read_plan(Path(config.plan)).require_fit(network.name, tuple(block.name for block in network.blocks))
    counts = zoo.num_parameters(network)
    ranges = partition(network.blocks, config.pipeline.stages, config.model.cuts, counts)
    blueprint = Blueprint(config, spec, network, ranges, find_shapes(network), counts)
    for stage in range(blueprint.num_stages):
        blueprint.stage_parameters(stage)
    if config.objective.transport.kind == "stage" and not blueprint.end_to_end:
        _require_equal_shapes(blueprint)
    _require_stable(blueprint)
    assert blueprint.itinerary.total_steps > 0
    return blueprint


def _require_equal_shapes(blueprint: Blueprint) -> None:
    """`kind: stage` compares the input of a stage's first residual block with the output of its last."""
    for stage, indices in enumerate(blueprint.ranges):
        counted = [index for index in indices if blueprint.network.blocks[index].counted]
        first = counted[0]
        before = blueprint.shapes[first - 1] if first > 0 else blueprint.network.input_shape
        after = blueprint.shapes[counted[-1]]
        if before != after:
            names = blueprint.network.blocks[first].name, blueprint.network.blocks[counted[-1]].name
            raise ModelError(
                f"objective.transport.kind: 'stage' needs equal shapes, but stage {stage} ({names[0]} to {names[1]}) "
                f"turns {before} into {after}; use 'branch' or 'displacement', or other model.cuts"
            )


def _require_stable(blueprint: Blueprint) -> None:
    """Refuse a tau with which SGD diverges whatever the data; what the data decide is left to `StabilityGuard`."""
    objective, optimizer = blueprint.config.objective, blueprint.config.optim
    transport = objective.transport
    moving = transport.multipliers.enabled  # a weight of 1 / lambda falls from step to step
    if optimizer.name != "sgd" or objective.name != "trgl" or transport.kind != "branch" or moving:
        return
    lr = optim.peak_rate(optimizer)
    for stage, indices in enumerate(blueprint.ranges):
        for index in indices:
            limit = certain_limit(blueprint.shapes[index], lr, optimizer.momentum, transport.norm)
            if blueprint.taus[stage] < limit and _adds_a_vector(blueprint.network.blocks[index]):
                raise ModelError(
                    f"objective.transport.tau: {blueprint.taus[stage]:g} in stage {stage} is below {limit:.3g}, where "
                    f"SGD with optim.lr {lr:g} and momentum {optimizer.momentum:g} diverges on the transport cost of "
                    f"block '{blueprint.network.blocks[index].name}' alone, whatever the data; raise tau or lower "
                    "optim.lr"
                )


def _adds_a_vector(spec: BlockSpec) -> bool:
    """Whether a residual branch of the block ends by adding a learned vector: BatchNorm's beta, or a bias."""
    with torch.device("meta"):
        block = spec.build()
    closed = any(isinstance(module, BatchNorm2d) for module in block.modules())
    return closed or any(layer.bias is not None for layer in getattr(block, "branch_ends", ()))
