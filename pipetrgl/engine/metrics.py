"""The metrics hook: means of a stage's losses, accuracy, speed and waits, every n optimizer steps.

Sums stay on the stage's device and are read once a row, so a step never waits for the device. What they are made of is
kept for a few steps and added up in one go: a dozen small operations after each micro-batch would cost more than that.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from pipetrgl.channels.contracts import Inbox, Outbox, ReplicaGroup
from pipetrgl.channels.replicas import summed
from pipetrgl.errors import DivergedError
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput

Row = dict[str, Any]
Sink = Callable[[Row], None]

logger = logging.getLogger(__name__)

_MAX_KEPT = 16
"""Micro-batches that are kept before they are added up; more only where one step has more."""

_MAX_KEPT_LOGITS = 2**20
"""The same of their logits, of which a text has as many for each token."""

NUMBERS = {
    "step": "Optimizer steps that the stage has reported.",
    "local_loss": "Mean local loss since the last row.",
    "task_loss": "Mean cross-entropy since the last row.",
    "transport_cost": "Mean transport cost since the last row, not weighted.",
    "accuracy": "Of the stage's head on training rows.",
    "images_per_s": "Training images per second of the stage.",
    "wait_share": "Share of the time that the stage waited for input or to send.",
}
"""The single numbers of a train row that are worth a curve, for dashboards."""


@final
class TrainMetrics:
    """Rows of kind "train"; see docs/run-folder.md for every field.

    Args:
        stage: measured.
        inbox, outbox: whose waits are reported.
        sink: takes the rows.
        every: optimizer steps between rows; the last row of a phase may cover fewer.
        learns: False for a stage that has no loss of its own, as an emulated one: there are times but no means.
    """

    def __init__(self, stage: Stage, inbox: Inbox, outbox: Outbox, sink: Sink, every: int, learns: bool = True) -> None:
        self._stage = stage
        self._inbox = inbox
        self._outbox = outbox
        self._sink = sink
        self._every = every
        self._learns = learns
        self._clock = _TrainClock(inbox, outbox)
        self._sums: Tensor | None = None
        self._rows = 0
        self._cost_names: tuple[str, ...] = ()
        self._kept: list[_Kept] = []  # not in the sums yet
        self._num_earlier = 0  # of these, those of steps before the one at hand
        self._targets_per_row = 1
        self._skipped = stage.skipped_updates
        self._unwritten = False  # a micro-batch has passed since the last row
        self._step = self._epoch = 0

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if not output.trained:
            self._clock.skip()
            return
        self._cost_names, self._targets_per_row = output.cost_names, micro_batch.targets_per_row
        self._clock.count(micro_batch.num_rows)
        loss = output.loss
        losses = (loss.total.detach(), loss.task, loss.transport, *loss.by_block)
        self._kept.append(_Kept(losses, output.logits.detach(), micro_batch.target, micro_batch.num_rows))
        self._step, self._epoch, self._unwritten = micro_batch.step + 1, micro_batch.epoch, True
        if micro_batch.closes_step:
            if self._stage.skipped_updates > self._skipped:
                self._skipped = self._stage.skipped_updates
                del self._kept[self._num_earlier :]  # a step that was skipped is no part of the means
            if len(self._kept) >= min(_MAX_KEPT, _MAX_KEPT_LOGITS // output.logits.numel()):
                self._add_up()
            self._num_earlier = len(self._kept)
            if micro_batch.closes_phase or self._step % self._every == 0:
                self._write()

    def close(self) -> None:
        self._sink(self._clock.summary(self._stage))

    def state(self) -> dict[str, Tensor]:
        """The sums since the last row, for a checkpoint between two rows, and how often it skipped and reused.

        Of all replicas together: all of them ask at the same step.
        """
        self._add_up()
        state: dict[str, Tensor] = {}
        sums, rows = self._sums_of_all()
        if sums is not None:
            state["sums"] = sums
        if self._unwritten:
            state["place"] = torch.tensor([rows, self._step, self._epoch])
        if self._skipped:
            state["skipped_updates"] = torch.tensor(self._skipped)
        if self._stage.num_reused:
            state["num_reused"] = torch.tensor(self._stage.num_reused)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the sums and the counts of a checkpoint; nothing to do where it has none.

        The first replica takes the sums, the others begin theirs anew: they are added up later.
        """
        first = self._stage.replicas.replica == 0
        if "sums" in state and first:
            self._sums = state["sums"].to(self._stage.device, copy=True)
        if "place" in state:
            rows, self._step, self._epoch = map(int, state["place"])
            self._rows = rows if first else 0
            self._unwritten = True
        if "skipped_updates" in state:
            self._skipped = self._stage.skipped_updates = int(state["skipped_updates"])
        if "num_reused" in state:
            self._stage.num_reused = int(state["num_reused"])

    def _add_up(self) -> None:
        """Into the sums, one after another: when that happens changes no bit of them."""
        if not self._kept:
            return
        kept, self._kept, self._num_earlier = self._kept, [], 0
        logits, target = torch.cat([one.logits for one in kept]), torch.cat([one.target for one in kept])
        correct = (logits.argmax(-1) == target.to(logits.device, non_blocking=True)).sum()
        losses = torch.stack([loss for one in kept for loss in one.losses]).view(len(kept), -1)
        sums = torch.zeros_like(losses[0]) if self._sums is None else self._sums[:-1]
        for row, one in zip(losses.unbind(), kept, strict=True):
            sums = sums + row * one.num_rows
            self._rows += one.num_rows
        if self._sums is not None:
            correct = correct + self._sums[-1]
        self._sums = torch.cat([sums, correct.to(sums.dtype).view(1)])

    def _write(self) -> None:
        self._add_up()
        row = {
            "kind": "train",
            "stage": self._stage.index,
            "replica": self._stage.replicas.replica,
            "step": self._step,
            "epoch": self._epoch,
            **self._means(),
            "weight": float(self._stage.objective.weight.value()) if self._stage.objective.regularised else 0.0,
            "lr": self._stage.learning_rate,
            "skipped_updates": self._skipped,
            "num_reused": self._stage.num_reused,
            **self._clock.since_last_row(self._stage.replicas),
        }
        self._sink(row)
        logger.info(log_line(row, self._stage.num_stages, self._stage.replicas.num_replicas))
        self._sums, self._rows, self._unwritten = None, 0, False

    def _sums_of_all(self) -> tuple[Tensor | None, int]:
        """Sums and rows of all replicas."""
        group = self._stage.replicas
        if group.num_replicas == 1:
            return self._sums, self._rows
        nothing = [0.0] * (len(self._cost_names) + 4)
        *sums, rows = summed(group, [*(nothing if self._sums is None else self._sums.tolist()), self._rows])
        return (torch.tensor(sums, device=self._stage.device) if rows else None), int(rows)

    def _means(self) -> Row:
        """Over the rows since the last row; nothing where every step was skipped, or none was learned from."""
        sums, rows = self._sums_of_all()
        if sums is None or not self._learns:
            nothing: Row = dict.fromkeys(("local_loss", "task_loss", "transport_cost", "accuracy"))
            return nothing | {"transport_cost_by_block": {}}
        local, task, transport, *by_block, correct = (total / rows for total in sums.tolist())
        if not all(map(math.isfinite, (local, task, transport))):
            raise DivergedError(
                f"stage {self._stage.index}, between steps {self._step - self._every + 1} and {self._step}: the local "
                f"loss is {local} (task {task}, transport {transport}); "
                "lower optim.lr, or raise objective.transport.tau"
            )
        return {
            "local_loss": local,
            "task_loss": task,
            "transport_cost": transport if self._stage.objective.measures else None,
            "transport_cost_by_block": dict(zip(self._cost_names, by_block, strict=True)),
            "accuracy": correct / self._targets_per_row,
        }


class _Kept(NamedTuple):
    """What the means need of one micro-batch; its losses are the local, task and transport one and each block's."""

    losses: tuple[Tensor, ...]
    logits: Tensor
    target: Tensor
    num_rows: int


@final
class _TrainClock:
    """Time of training micro-batches only, split into computing, waiting for input and waiting to send.

    Its processor time is that of the whole process, every thread of it.
    """

    def __init__(self, inbox: Inbox, outbox: Outbox) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._mark = self._read()
        self._total = [0.0] * 5  # seconds, inbox wait, outbox wait, processor seconds, images
        self._at_last_row = [0.0] * 5
        self._first = True

    def _read(self) -> tuple[float, float, float, float]:
        return time.perf_counter(), self._inbox.waited_s, self._outbox.waited_s, time.process_time()

    def skip(self) -> None:
        self._mark = self._read()

    def count(self, images: int) -> None:
        now = self._read()
        if not self._first:  # the first micro-batch holds the fill of the pipeline and all warm-up
            for part in range(4):
                self._total[part] += now[part] - self._mark[part]
            self._total[4] += images
        self._first = False
        self._mark = now

    def since_last_row(self, replicas: ReplicaGroup) -> Row:
        """Images per second of all replicas together, and the mean of their waits."""
        seconds, waited, send_waited, _, images = (
            now - then for now, then in zip(self._total, self._at_last_row, strict=True)
        )
        self._at_last_row = list(self._total)
        if seconds <= 0:  # on every replica: nothing has been counted yet
            return {"images_per_s": None, "wait_share": None}
        rate, share = summed(replicas, [images / seconds, (waited + send_waited) / seconds])
        return {"images_per_s": rate, "wait_share": share / replicas.num_replicas}

    def summary(self, stage: Stage) -> Row:
        """Of all replicas together; times and shares are their means."""
        seconds, waited, send_waited, cpu, images = self._total
        count = stage.replicas.num_replicas
        rate, seconds, waited, send_waited, cpu, sent_bytes = summed(
            stage.replicas, [_ratio(images, seconds) or 0.0, seconds, waited, send_waited, cpu, self._outbox.sent_bytes]
        )
        return {
            "kind": "summary",
            "stage": stage.index,
            "num_steps": stage.num_updates,
            "skipped_updates": stage.skipped_updates,
            "num_reused": stage.num_reused,
            "train_s": seconds / count,
            "images_per_s": rate or None,
            "wait_share": _ratio(waited, seconds),
            "send_wait_share": _ratio(send_waited, seconds),
            "compute_share": _ratio(seconds - waited - send_waited, seconds),
            "cpu_s": cpu / count,
            "bytes_sent": int(sent_bytes),
        }


def log_line(row: Row, num_stages: int, num_replicas: int = 1) -> str:
    """A train row as one line: `s1/4 r0/1 step 1200 | local 1.832 (task 1.790, transport 0.041) | ...`."""
    rate = "-" if row["images_per_s"] is None else f"{row['images_per_s']:.0f}"
    wait = "-" if row["wait_share"] is None else f"{100 * row['wait_share']:.0f} %"
    if row["local_loss"] is None:
        means = "every update skipped" if row["skipped_updates"] > 0 else "no loss of its own"
    elif row["transport_cost"] is None:
        means = f"local {row['local_loss']:.3f} | head acc {100 * row['accuracy']:.1f} %"
    else:
        more = row["local_loss"] - row["task_loss"]
        term = "transport" if row["weight"] > 0 or more == 0 else "criterion"  # a rival's: may be below 0
        means = (
            f"local {row['local_loss']:.3f} (task {row['task_loss']:.3f}, {term} {more:.3f}) | "
            f"head acc {100 * row['accuracy']:.1f} %"
        )
    return (
        f"s{row['stage']}/{num_stages} r{row['replica']}/{num_replicas} step {row['step']} | {means} | {rate} img/s | "
        f"waited {wait}"
    )


def _ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to divide by: an absent value is never shown as a number."""
    return part / whole if whole > 0 else None
