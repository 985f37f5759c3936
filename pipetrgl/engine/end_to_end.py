"""End-to-end training: one loss, at the last head, whose gradient goes through all stages.

    stage 0 ─▶ stage 1 ─▶ .. ─▶ last head ─▶ task loss
    update  ◀─ update  ◀─ .. ◀─ backward  ◀─────┘          once a step, after `accumulate` micro-batches

What travels through the loop is a whole step; it is divided here. Several workers share one as in engine/schedules.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from pipetrgl.config.schema import TrainConfig
from pipetrgl.data import itinerary
from pipetrgl.engine.loop import Hook
from pipetrgl.engine.nonfinite import all_finite
from pipetrgl.errors import DivergedError
from pipetrgl.microbatch import MicroBatch
from pipetrgl.objective import LocalLoss
from pipetrgl.stage import Stage, StageOutput


@final
class Chain(nn.Module):
    """A stage as an ordinary module, tensor in and tensor out: its blocks, and in the last stage the head."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.blocks = nn.ModuleList(stage.blocks)
        self.head = stage.head
        self._coming: Iterator[MicroBatch] = iter(())

    def expect(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Say what `forward` will be called with, in order: dropout goes by a micro-batch's place in its step."""
        self._coming = iter(micro_batches)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) as the first block takes it, to the last block's activation, or to logits (N, classes); float32."""
        activation, _, _ = self.stage.run_blocks(next(self._coming).carrying(x), self.training)
        return self.stage.answer(activation)


@final
class OneLoss:
    """The task loss of a step, micro-batch by micro-batch, and what the hooks of the last stage want of it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._logits: list[Tensor] = []
        self._total: Tensor | None = None

    def begin(self, batch: MicroBatch) -> None:
        self._batch = batch
        self._logits.clear()
        self._total = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """What a micro-batch adds to the step's loss: its mean over rows, times its share of the step's rows.

        Raises:
            DivergedError: it is NaN or infinite; on a GPU the metrics find that later.
        """
        loss = self._stage.objective.task_loss(logits, target)
        if len(target) != self._batch.batch_rows:
            loss = loss * (len(target) / self._batch.batch_rows)
        now = loss.detach()
        if now.device.type == "cpu" and not all_finite(now):
            raise DivergedError(
                f"stage {self._stage.index}, step {self._batch.step}: the task loss is {now.item()}; lower optim.lr"
            )
        self._total = now if self._total is None else self._total + now
        self._logits.append(logits.detach())
        return loss

    def output(self) -> StageOutput:
        """Of the whole step."""
        assert self._total is not None
        zero = torch.zeros_like(self._total)
        # a leaf, for the graph has served its purpose: it says that the step was learned from
        loss = LocalLoss(self._total.clone().requires_grad_(), self._total, zero, ())
        logits = torch.cat(self._logits)
        return StageOutput(logits, logits, loss, ())


@final
class EndToEnd:
    """All stages in one process, to the loop a single one; both passes of a step happen in its `forward`.

    Args:
        stages: of the whole network; the last one has the head.
        train: how a step is divided.
    """

    def __init__(self, stages: Sequence[Stage], train: TrainConfig) -> None:
        self._chains = [Chain(stage) for stage in stages]
        self._train = train
        self._loss = OneLoss(stages[-1])

    @property
    def index(self) -> int:
        return self._chains[-1].stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        parts = divided(micro_batch, self._train) if train else [micro_batch]
        for chain in self._chains:
            chain.train(train)
            chain.expect(parts)
        if not train:
            with torch.no_grad():
                return scored(self._through(micro_batch))
        self._loss.begin(micro_batch)
        for part in parts:
            logits = self._through(part)
            self._loss(logits, part.target.to(logits.device)).backward()  # type: ignore[no-untyped-call]
        return self._loss.output()

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        """Done."""

    def update(self) -> None:
        for chain in self._chains:
            chain.stage.update()

    def _through(self, micro_batch: MicroBatch) -> Tensor:
        assert isinstance(micro_batch.activation, Tensor)
        x = micro_batch.activation.to(self._chains[0].stage.device, non_blocking=True)
        for chain in self._chains:
            x = chain(x)
        return x


def one_stages_hooks(hooks: Sequence[Sequence[Hook]]) -> list[Hook]:
    """The hooks of all stages as those of the one that the loop sees."""
    *headless, last = hooks
    return [*(_Headless(hook) for own in headless for hook in own), *last]


@final
class _Headless:
    """The hook of a stage without head, where the loop sees the last stage's output."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self._hook(micro_batch, unscored(micro_batch, output.trained))

    def close(self) -> None:
        self._hook.close()


def divided(batch: MicroBatch, train: TrainConfig) -> list[MicroBatch]:
    """The micro-batches of a step, as the itinerary of the other orders makes them."""
    return [batch.share(rows) for rows in itinerary.divided(batch.num_rows, train)]


def scored(logits: Tensor) -> StageOutput:
    """Of the last stage in an evaluation, whose hook makes the loss."""
    zero = torch.zeros((), device=logits.device)
    return StageOutput(logits, logits, LocalLoss(zero, zero, zero, ()), ())


def unscored(batch: MicroBatch, trained: bool) -> StageOutput:
    """Of a stage without head: no loss of its own, and logits that say nothing."""
    zero = torch.zeros(())
    nothing = torch.zeros(*batch.target.shape, 1)
    return StageOutput(nothing, nothing, LocalLoss(torch.zeros((), requires_grad=trained), zero, zero, ()), ())
