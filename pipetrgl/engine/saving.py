"""Saving: each stage writes its part of a checkpoint when the closing micro-batch of a chosen step has passed.

Without a barrier: data flows one way and in order, so the files of one step are a consistent cut.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors.torch
from torch import Tensor

from pipetrgl.channels.contracts import Outbox
from pipetrgl.engine.checkpoint import MANIFEST, step_folder, write_atomically
from pipetrgl.engine.metrics import Sink, TrainMetrics
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage, StageOutput

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class SaveSchedule:
    """When a stage saves.

    Attributes:
        every: optimizer steps between two checkpoints; 0 for none before the end.
        final: also when the run is done.
        total_steps: of the run; where its stream ends earlier, a checkpoint is always written.
    """

    every: int
    final: bool
    total_steps: int

    def saves_after(self, step: int) -> bool:
        """Whether in mid-stream, when `step` optimizer steps are taken."""
        return self.every > 0 and step % self.every == 0

    def saves_at_end(self, step: int) -> bool:
        """Whether when the stream has ended with `step` optimizer steps taken."""
        return self.final or step < self.total_steps


@final
class SaveCheckpoints:
    """Snapshots the stage at once and writes the snapshot in the background; tells the sink which file holds it.

    A file that cannot be written, on a full disk for example, is a warning: training goes on, and the checkpoint before
    stays the newest complete one.

    Args:
        stage: saved with its optimizer.
        metrics: whose sums since the last row are saved as well, so that a resumed run writes the same rows.
        outbox: of the stage: a checkpoint is durable once the next stage has received all that it covers.
        run: the run folder.
        sink: takes rows of kind "checkpoint" (the file is written), "durable" (a replacement of this stage could start
            from it) and "last" (the stream has ended).
        schedule: when to save.
        first_step: optimizer steps taken before this stream begins.
    """

    def __init__(
        self,
        stage: Stage,
        metrics: TrainMetrics,
        outbox: Outbox,
        run: Path,
        sink: Sink,
        schedule: SaveSchedule,
        first_step: int = 0,
    ) -> None:
        self._stage = stage
        self._metrics = metrics
        self._outbox = outbox
        self._run = run
        self._sink = sink
        self._schedule = schedule
        self._step = first_step  # of the run, also while this stage is idle
        self._saved: int | None = None
        self._index = -1  # of the micro-batch that closed `_step`
        # step of each file that is not known to be durable yet, and index of the micro-batch that closed it
        self._written: deque[tuple[int, int]] = deque()
        self._writer: threading.Thread | None = None

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if micro_batch.split is Split.TRAIN and micro_batch.closes_step:
            self._step, self._index = micro_batch.step + 1, micro_batch.index
            if self._schedule.saves_after(self._step):
                self._save()
        self._announce()

    def close(self) -> None:
        complete = (step_folder(self._run, self._step) / MANIFEST).exists()  # of a run that went on from its last step
        if self._schedule.saves_at_end(self._step) and self._saved != self._step and not complete:
            self._save()
        if self._writer is not None:
            self._writer.join()
        self._announce()
        self._sink({"kind": "last", "stage": self._stage.index, "step": self._step})

    def _announce(self) -> None:
        durable = None
        while self._written and self._written[0][1] <= self._outbox.received_index:
            durable = self._written.popleft()
        if durable is not None:
            step, index = durable
            self._sink({"kind": "durable", "stage": self._stage.index, "step": step, "next_index": index + 1})

    def _save(self) -> None:
        step = self._saved = self._step
        if self._stage.replicas.replica > 0:
            self._metrics.state()  # the first replica saves for all, and asks for the sums of all
            return
        if self._writer is not None:
            self._writer.join()  # at most one snapshot is in memory: a slow disk slows the stage, not its memory
            self._announce()
        # Cloned, also on the CPU: the next step changes the weights in place while the file is being written.
        state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._state().items()}
        self._writer = threading.Thread(
            target=self._write, args=(step, self._index, state), name="checkpoint", daemon=True
        )
        self._writer.start()

    def _state(self) -> dict[str, Tensor]:
        metrics = self._metrics.state()
        return {
            **self._stage.state(),
            **self._stage.optimizer_state(),
            **{f"metrics.{self._stage.span}.{name}": tensor for name, tensor in metrics.items()},
        }

    def _write(self, step: int, index: int, state: dict[str, Tensor]) -> None:
        name = f"stage-{self._stage.index}.safetensors"
        if not all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
            logger.warning(
                "s%d/%d step %d: a weight is not finite, so no checkpoint is written; the one before stays the newest",
                self._stage.index, self._stage.num_stages, step,
            )  # fmt: skip
            return
        try:
            digest = write_atomically(step_folder(self._run, step) / name, safetensors.torch.save(state))
        except OSError as error:
            logger.warning(
                "s%d/%d step %d: the checkpoint could not be written (%s); training goes on",
                self._stage.index, self._stage.num_stages, step, error,
            )  # fmt: skip
            return
        row = {"kind": "checkpoint", "stage": self._stage.index, "step": step, "file": name, "sha256": digest}
        self._sink(row)
        self._written.append((step, index))
