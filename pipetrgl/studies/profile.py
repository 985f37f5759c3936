"""Profiles a network: what every unit of blocks and every head that could follow it cost on the device.

opening   z ─▶ unit ─▶ head ─▶ loss          each a real stage of `worker.build_stage`, timed in turn;
inner     z ─▶ door ─▶ unit ─▶ head ─▶ loss  the cost of a unit is what its stage takes more than the head alone.
head      z ─▶ door ─▶ head ─▶ loss          The door asks for z's gradient, as a block before it would.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec
from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.codecs import CODECS, encode
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import DataSpec
from pipetrgl.errors import ConfigError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.partition import partition
from pipetrgl.seeds import torch_stream
from pipetrgl.stage import Stage
from pipetrgl.studies.costs import Cost, UnitCost
from pipetrgl.worker import build_stage, configure_torch

WARM_UP = 3
"""Steps of each stage before any is timed."""


@final
class _Door(nn.Module):
    """Hands its input on as if a block before it had made it: a gradient is wanted for it, unless it is tokens."""

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(x.detach().requires_grad_(x.is_floating_point() and torch.is_grad_enabled()))


@final
@dataclass(frozen=True)
class Profile:
    """A network as measured.

    Attributes:
        network: its name.
        rows: of the micro-batch.
        units: in forward order.
        cpu_share: processor time / wall time of the measurement, for one thread on a CPU: below 1 where others worked
            on this machine, and the times are as much too long; None elsewhere.
    """

    network: str
    rows: int
    units: tuple[UnitCost, ...]
    cpu_share: float | None

    def scaled(self, rows: int, speed: float) -> Profile:
        """As it should be with micro-batches of `rows`, on workers `speed` times as fast: all in proportion."""
        units = tuple(unit.scaled(rows / self.rows, speed) for unit in self.units)
        return dataclasses.replace(self, rows=rows, units=units)


def profile(config: Config, spec: DataSpec, repeats: int) -> Profile:
    """Measure on random rows, `train.threads` intra-op threads; medians of `repeats` steps after a warm-up.

    Args:
        config: its cuts, stages and order do not matter.
        spec: of the data set.
        repeats: timed steps of each stage.
    Raises:
        ConfigError: the costs of this objective do not belong to blocks.
    """
    if config.objective.transport.kind == "stage":
        raise ConfigError("objective.transport.kind: 'stage' has no cost of single blocks, so no cuts can be planned")
    configure_torch(config.train)
    whole = draw_up(_in_one_stage(config), spec)
    num_units = sum(block.counted for block in whole.network.blocks)
    ranges = partition(whole.network.blocks, num_units, "even", whole.num_parameters)
    activation = whole.draw_input(0, config.train.micro_batch_rows, torch_stream(config.seed, "profile"))
    units = []
    wall, processor = time.perf_counter(), time.process_time()
    for blocks in ranges:
        unit, activation = _measure(whole, blocks, activation, repeats)
        units.append(unit)
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    alone = config.pipeline.hardware == "cpu" and config.train.threads == 1
    return Profile(whole.network.name, config.train.micro_batch_rows, tuple(units), share if alone else None)


def _in_one_stage(config: Config) -> Config:
    """The same network and objective, uncut; of the taus it only matters whether any is finite."""
    tau = config.objective.transport.tau
    transport = config.objective.transport.model_copy(update={"tau": min(tau) if isinstance(tau, list) else tau})
    return config.model_copy(
        update={
            "plan": None,
            "model": config.model.model_copy(update={"cuts": "even"}),
            "pipeline": config.pipeline.model_copy(update={"stages": 1}),
            "objective": config.objective.model_copy(update={"transport": transport}),
            "train": config.train.model_copy(update={"order": "parallel"}),
        }
    )


def _measure(whole: Blueprint, blocks: range, activation: Tensor, repeats: int) -> tuple[UnitCost, Tensor]:
    """The cost of one unit, and what it hands on."""
    config = whole.config
    device = torch.device(config.pipeline.hardware)
    specs = [whole.network.blocks[index] for index in blocks]
    shape = whole.shapes[blocks.stop - 1]
    door = BlockSpec("door", "door.", _Door, counted=False)
    behind = dataclasses.replace(door, counted=True)  # a stage has at least one block that counts
    stages = [build_stage(_alone(whole, chain, shape), 0, device) for chain in (specs, [door, *specs], [behind])]
    micro_batch = _micro_batch(activation.to(device), whole)
    output = stages[0].forward(micro_batch, train=False).activation.detach().clone()
    inputs = [micro_batch, micro_batch, micro_batch.carrying(output)]
    for _ in range(WARM_UP):
        for stage, batch in zip(stages, inputs, strict=True):
            _timed_step(stage, batch)
    rounds = [[_timed_step(stage, batch) for stage, batch in zip(stages, inputs, strict=True)] for _ in range(repeats)]
    opening, inner, head = (
        _cost(stage, batch, [times[number] for times in rounds], config.train.accumulate)
        for number, (stage, batch) in enumerate(zip(stages, inputs, strict=True))
    )
    came_in, wired = activation.nbytes, [output]
    if config.objective.needs_images:  # beside every activation, though the link to the last stage carries none
        image = torch.empty(activation.shape[0], *whole.network.input_shape)
        came_in += image.nbytes if blocks.start > 0 else 0
        wired.append(image)
    wire_bytes = sum(part.nbytes for part in encode(CODECS[config.channel.codec], tuple(wired)))
    names = tuple(block.name for block in specs)
    unit = UnitCost(names, _more(opening, head), _more(inner, head), head, came_in, output.nbytes, wire_bytes)
    return unit, output


def _alone(whole: Blueprint, blocks: Sequence[BlockSpec], shape: tuple[int, ...]) -> Blueprint:
    """The blueprint of a network of these blocks in one stage; only the last shape and no parameter count is read."""
    network = dataclasses.replace(whole.network, blocks=tuple(blocks))
    length = len(blocks)
    return dataclasses.replace(
        whole, network=network, ranges=(range(length),), shapes=(shape,) * length, num_parameters=(0,) * length
    )


def _micro_batch(activation: Tensor, whole: Blueprint) -> MicroBatch:
    rows = activation.shape[0]
    per_row = whole.network.target_shape
    target = (torch.arange(rows * math.prod(per_row)) % whole.spec.num_classes).view(rows, *per_row)
    return MicroBatch(activation, target, torch.arange(rows), Split.TRAIN, 0, 0, 0, 0, rows, True, False)


def _timed_step(stage: Stage, micro_batch: MicroBatch) -> tuple[float, float, float]:
    """Seconds of forward, backward and update."""
    marks = [_now(stage.device)]
    output = stage.forward(micro_batch, train=True)
    marks.append(_now(stage.device))
    stage.backward(output, micro_batch)
    marks.append(_now(stage.device))
    stage.update()
    marks.append(_now(stage.device))
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def _now(device: torch.device) -> float:
    """The clock once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cost(stage: Stage, micro_batch: MicroBatch, times: Sequence[tuple[float, float, float]], accumulate: int) -> Cost:
    forward_s, backward_s, update_s = (statistics.median(column) for column in zip(*times, strict=True))
    parameters = sum(parameter.nbytes for _, parameter in stage.named_parameters())
    held = sum(tensor.nbytes for tensor in (*stage.state().values(), *stage.optimizer_state().values()))
    saved = saved_bytes(stage, micro_batch)
    return Cost(forward_s, backward_s, update_s / accumulate, saved, held + parameters, parameters)


def saved_bytes(stage: Stage, micro_batch: MicroBatch) -> int:
    """Bytes that a forward keeps for the backward pass: each storage once, output included, weights and input not."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # not the tensor itself, which may be its own node's output: a cycle

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage.forward(micro_batch, train=True)
    keep(output.activation)
    assert isinstance(micro_batch.activation, Tensor)
    for tensor in (
        micro_batch.activation,
        micro_batch.target,
        *(parameter for _, parameter in stage.named_parameters()),
    ):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def _more(stage: Cost, head: Cost) -> Cost:
    """What the blocks of a stage cost beside its head; no time is below zero, whatever the noise."""
    return Cost(
        max(0.0, stage.forward_s - head.forward_s),
        max(0.0, stage.backward_s - head.backward_s),
        max(0.0, stage.update_s - head.update_s),
        stage.saved_bytes - head.saved_bytes,
        stage.state_bytes - head.state_bytes,
        stage.gradient_bytes - head.gradient_bytes,
    )
