"""Values that are not finite: found in the forward pass in which they arise, before the activation leaves the stage.

stop: the run ends with an error that names stage, block and step.
skip: the step's update is left out on this stage; the activation goes on, so the stages behind it see and skip it too.
"""

from __future__ import annotations

import logging
import math
from typing import final

import torch
from torch import Tensor

from pipetrgl.channels.replicas import any_replica
from pipetrgl.engine.loop import Trainee
from pipetrgl.errors import DivergedError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.models.synchronised import SynchronisedBatchNorm
from pipetrgl.stage import Stage, StageOutput

logger = logging.getLogger(__name__)

_WARN_EVERY = 100


def watch(stage: Stage, on_nonfinite: str) -> Trainee:
    """The stage under a policy of `train.on_nonfinite`.

    On CUDA a look at every micro-batch makes the host wait for the device. There `stop` leaves it to the metrics and
    evaluation rows, which read their sums anyway; `skip` cannot, and waits once a micro-batch.
    """
    if on_nonfinite == "skip":
        return SkipNonFinite(stage)
    return stage if stage.device.type == "cuda" else StopNonFinite(stage)


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Neither ever leaves a sum again, so a finite sum proves it; only where the sum is not finite, which may also be an
    overflow, is every element looked at. On the CPU the sum costs a seventh of `isfinite().all()` or less.
    """
    x = x.detach()
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


@final
class StopNonFinite:
    """A stage that ends the run at the first micro-batch, also of an evaluation, whose outputs are not finite."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        output = self._stage.forward(micro_batch, train)
        if not _is_finite(output, train):
            where = _where(self._stage, micro_batch, train, output)
            finding = _finding(self._stage, where, micro_batch, train, output)
            raise DivergedError(f"{finding}; {self._advice(where)}")
        return output

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._stage.backward(output, micro_batch)

    def update(self) -> None:
        self._stage.update()

    def _advice(self, where: str) -> str:
        if where != "the input":
            return "lower optim.lr, or raise objective.transport.tau"
        if self.index == 0:
            return "the images hold such values"
        # what that stage handed on was looked at there
        return f"stage {self.index - 1} handed on finite values, which channel.codec may not hold"


@final
class SkipNonFinite:
    """A stage that after a step with such a micro-batch is what it was before the step, but for its step count.

    micro-batch      0 of 2       1 of 2: NaN       update
    snapshot ─▶ forward, backward  forward  ─▶ gradients dropped, BatchNorm buffers and multiplier set back

    What passes without training, as an evaluation does, changes nothing and is left to the evaluation's row.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._before: _Snapshot | None = None  # of the step at hand
        self._poisoned = False

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        if train and self._before is None:
            self._before = _Snapshot(self._stage)
        output = self._stage.forward(micro_batch, train)
        if train and not self._poisoned and not _is_finite(output, train):
            self._poisoned = True
            self._warn(micro_batch, output)
        return output

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        if not self._poisoned:
            self._stage.backward(output, micro_batch)

    def update(self) -> None:
        assert self._before is not None, "update follows a training forward"
        if any_replica(self._stage.replicas, self._poisoned):
            self._before.restore()
            self._stage.skip_update()
        else:
            self._stage.update()
        self._before, self._poisoned = None, False

    def _warn(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        count = self._stage.skipped_updates + 1
        if count == 1 or count % _WARN_EVERY == 0:
            where = _where(self._stage, micro_batch, True, output)
            finding = _finding(self._stage, where, micro_batch, True, output)
            logger.warning("%s; the step's update is skipped, %d so far on this stage", finding, count)


class _Snapshot:
    """What a training forward changes in a stage: running statistics and multiplier."""

    def __init__(self, stage: Stage) -> None:
        self._weight = stage.objective.weight
        self._multiplier = self._weight.state()
        buffers = (buffer for _, module in stage.named_modules() for buffer in module.buffers())
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def restore(self) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)
        self._weight.load_state(self._multiplier)


def _is_finite(output: StageOutput, train: bool) -> bool:
    """An evaluation's loss is another one, of all its rows, and looked at when they have passed."""
    judged = (output.loss.total, output.loss.transport) if train else (output.logits,)
    return all(map(all_finite, (output.activation, *judged)))


def _where(stage: Stage, micro_batch: MicroBatch, train: bool, output: StageOutput) -> str:
    """The first place whose output is not finite; runs the blocks once more, one by one, on the same micro-batch."""
    came_in = micro_batch.activation
    if not all(map(all_finite, came_in if isinstance(came_in, tuple) else (came_in,))):
        return "the input"
    if any(isinstance(layer, SynchronisedBatchNorm) for block in stage.blocks for layer in block.modules()):
        return "a block or the head"  # running them again would need the other replicas
    with torch.no_grad():
        for name, activation, _ in stage.walk(micro_batch, train):
            if not all_finite(activation):
                return f"block {name}"
    if not all_finite(output.activation):
        return "a block that is finite when run again"  # a fault of the machine
    for name, cost in zip(output.cost_names, output.loss.by_block, strict=True):
        if train and not all_finite(cost):
            return f"the transport cost of block {name}"
    if not (all_finite(output.logits) and all_finite(output.loss.task)):
        return "the head"
    return "the transport cost" if stage.objective.regularised else "the objective's criterion"


def _finding(stage: Stage, where: str, micro_batch: MicroBatch, train: bool, output: StageOutput) -> str:
    step = f"step {micro_batch.step}"
    if micro_batch.split is not Split.TRAIN:
        step = f"{micro_batch.split.label} after step {micro_batch.step}"
    loss = output.loss
    if not all_finite(output.activation):
        what = "the activation is not finite"
    elif train:
        what = f"the local loss is {loss.total:g} (task {loss.task:g}, transport {loss.transport:g})"
    else:
        what = "the logits are not finite"
    return f"stage {stage.index}, {where}, {step}: {what}"
