"""The evaluation hook: task loss and accuracy of a stage's head over one pass of the validation or test split."""

from __future__ import annotations

import logging
import math
from typing import final

import torch
from torch import Tensor

from pipetrgl.channels.replicas import summed
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.errors import DivergedError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.objective import cross_entropy
from pipetrgl.stage import Stage, StageOutput

logger = logging.getLogger(__name__)


@final
class Evaluation:
    """Rows of kind "valid" and "test", one when the last micro-batch of a pass has gone by.

    The loss is the plain cross-entropy without label smoothing, so that it can be compared between configs.

    Args:
        stage: scored.
        sink: takes the rows.
        on_nonfinite: "stop" raises where the loss is NaN or infinite; "skip" warns, and the row holds null.
        learns: False for an emulated stage, whose head knows nothing: the row holds null.
    """

    def __init__(self, stage: Stage, sink: Sink, on_nonfinite: str, learns: bool = True) -> None:
        self._stage = stage
        self._sink = sink
        self._on_nonfinite = on_nonfinite
        self._learns = learns
        self._sums: Tensor | None = None
        self._rows = 0

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if micro_batch.split is Split.TRAIN or micro_batch.is_tick:
            return
        target = micro_batch.target.to(output.logits.device)
        loss = cross_entropy(output.logits, target, reduction="sum")
        correct = (output.logits.argmax(-1) == target).sum().to(loss.dtype)
        sums = torch.stack([loss, correct])
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows += micro_batch.num_rows
        if micro_batch.closes_split:
            self._sink(self._row(micro_batch))
            self._sums, self._rows = None, 0

    def close(self) -> None:
        pass

    def _row(self, micro_batch: MicroBatch) -> Row:
        assert self._sums is not None
        loss, correct, rows = summed(self._stage.replicas, [*self._sums.tolist(), self._rows])
        finite = math.isfinite(loss)
        if not finite:
            text = f"stage {self._stage.index}, {micro_batch.split.label} after step {micro_batch.step}: "
            text += f"the task loss is {loss}"
            if self._on_nonfinite == "stop":
                raise DivergedError(f"{text}; lower optim.lr, or raise objective.transport.tau")
            logger.warning("%s; the row holds null", text)
        known, answers = finite and self._learns, rows * micro_batch.targets_per_row
        return {
            "kind": micro_batch.split.label,
            "stage": self._stage.index,
            "step": micro_batch.step,
            "epoch": micro_batch.epoch,
            "task_loss": loss / answers if known else None,
            "accuracy": correct / answers if known else None,
            "num_samples": int(rows),
        }
