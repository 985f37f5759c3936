"""The recorder: gathers the rows of all workers into `metrics.jsonl`, and into `result.json` at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from pipetrgl.blueprint import Blueprint
from pipetrgl.engine.checkpoint import drop_after, prune, step_folder, write_atomically, write_manifest
from pipetrgl.engine.metrics import Row
from pipetrgl.engine.rowfile import RowFile
from pipetrgl.errors import StoppedError

logger = logging.getLogger(__name__)

_BY_STEP = {"train", "valid", "test", "geometry"}
_KEPT = {*_BY_STEP, "log"}
_GEOMETRY = ("straightness", "monotone_share", "monotone_share_by_block", "relative_cost_by_block", "num_samples")


@final
class Recorder:
    """A sink for rows; lives in the process that leads the run.

    Args:
        run: the run folder.
        blueprint: of the run.
        display: sees every row as well, to show progress.
    """

    def __init__(self, run: Path, blueprint: Blueprint, display: Callable[[Row], None]) -> None:
        self._run = run
        self._blueprint = blueprint
        self._display = display
        self._metrics = RowFile(run / "metrics.jsonl")
        self._stages: list[dict[str, Row]] = [{} for _ in range(blueprint.num_stages)]
        self._events: list[dict[str, Any]] = []
        self._files: dict[int, dict[str, str]] = {}  # step -> file -> SHA-256
        self._recoveries: list[Row] = []
        self._start = time.perf_counter()
        self._first_step = 0

    def __call__(self, row: Row) -> None:
        kind = row["kind"]
        if kind in _BY_STEP:
            latest = self._stages[row["stage"]].get(kind)
            if latest is not None and row["step"] <= latest["step"]:
                return  # a stage that was replaced reports again what its predecessor had reported
        if kind in _KEPT:
            self._metrics.append(row)
        if kind == "trace":
            self._events.extend(row["events"])
        elif kind == "checkpoint":
            self._note_file(row)
        elif kind == "recovery":
            self._note_recovery(row)
        else:
            replica = row.get("replica", 0)  # what all replicas say of themselves stays apart
            self._stages[row["stage"]][f"{kind}/{replica}" if replica else kind] = row
        self._display(row)

    def require_complete(self) -> None:
        """Raises:
        StoppedError: the stream ended before its last step; every stage has saved.
        """
        total = self._blueprint.itinerary.total_steps
        last = min(rows["last"]["step"] for rows in self._stages)
        if last < total:
            raise StoppedError(f"stopped after step {last} of {total}; go on with checkpoint.resume=auto")

    def finish(self, status: str, launcher: str, environment: dict[str, Any], error: str | None = None) -> Row:
        """Write `trace.json` and `result.json`; returns the result.

        Args:
            status: "done", "interrupted" or "failed".
            launcher: that ran.
            environment: versions and machine.
            error: the message of the failure.
        """
        self._metrics.close()
        result = self._result(status, launcher, environment, error)
        try:
            if self._events:
                trace = {"traceEvents": self._events, "displayTimeUnit": "ms"}
                write_atomically(self._run / "trace.json", json.dumps(trace).encode())
            write_atomically(self._run / "result.json", json.dumps(result, indent=2).encode())
        except OSError as failure:
            logger.warning("the run's result could not be written to %s (%s)", self._run, failure)
        return result

    def rewind(self, step: int) -> None:
        """Forget the rows after `step` optimizer steps, which the run goes on from: they will be written again."""
        kept = self._metrics.rewind(lambda row: _precedes(row, step))
        drop_after(self._run, step)
        self._events.clear()
        self._files.clear()
        self._stages = [{} for _ in self._stages]
        for row in kept:
            self._stages[row["stage"]][row["kind"]] = row
        self._first_step = step

    def _note_recovery(self, row: Row) -> None:
        """Of each stage that was replaced alone: when it was linked again, then when it had caught up."""
        seconds = {f"{row['what'].replace(' ', '_')}_s": row["seconds"]}
        if row["what"] == "linked":
            about = {name: row[name] for name in ("stage", "step", "from_step", "error")}
            self._recoveries.append({**about, **seconds, "caught_up_s": None})
        else:
            newest = next(one for one in reversed(self._recoveries) if one["stage"] == row["stage"])
            newest.update(seconds)

    def _note_file(self, row: Row) -> None:
        """The manifest makes a checkpoint complete once every stage has written its file."""
        files = self._files.setdefault(row["step"], {})
        files[row["file"]] = row["sha256"]
        if len(files) < self._blueprint.num_stages:
            return
        step, files = row["step"], self._files.pop(row["step"])
        try:
            write_manifest(step_folder(self._run, step), step, files, self._blueprint.updates(step))
            prune(self._run, self._blueprint.config.checkpoint.keep)
        except OSError as error:
            logger.warning("step %d: the checkpoint could not be completed (%s)", step, error)

    def _result(self, status: str, launcher: str, environment: dict[str, Any], error: str | None) -> Row:
        stages = [self._stage(index) for index in range(self._blueprint.num_stages)]
        valid = [stage["valid_accuracy"] for stage in stages]
        headed = [k for k in range(len(stages)) if self._blueprint.has_head(k)]
        scored = all(valid[k] is not None for k in headed)
        rates = [stage["images_per_s"] for stage in stages if stage["images_per_s"] is not None]
        times = [stage["train_s"] for stage in stages if stage["train_s"] is not None]
        together = not self._blueprint.config.train.one_by_one
        return {
            "schema": 1,
            "command": "train",
            "status": status,
            "name": self._blueprint.config.run.name,
            "run": str(self._run),
            "launcher": launcher,
            "model": self._blueprint.network.name,
            "data": self._blueprint.spec.name,
            "device": self._blueprint.config.pipeline.device,
            "config_hash": self._blueprint.config_hash,
            "num_stages": len(stages),
            "num_steps": (max if together else sum)(stage["num_steps"] for stage in stages),
            "first_step": self._first_step,
            "total_steps": self._blueprint.itinerary.total_steps,
            "num_parameters": {
                "stages": [stage["num_parameters"] for stage in stages],
                "heads": [stage["head_parameters"] for stage in stages],
            },
            "recoveries": self._recoveries,
            "wall_s": time.perf_counter() - self._start,
            "train_s": (max(times) if together else sum(times)) if times else None,
            "images_per_s": min(rates, default=None),
            "stages": stages,
            # chosen on the validation split; the test split is only reported
            "best_head": max(headed, key=lambda k: (valid[k], k)) if scored else None,
            "last_head": len(stages) - 1,
            "environment": environment,
            "error": error,
        }

    def _stage(self, index: int) -> Row:
        rows, blueprint = self._stages[index], self._blueprint
        train, summary = rows.get("train", {}), rows.get("summary", {})
        blocks, head = blueprint.stage_parameters(index)
        return {
            "stage": index,
            "blocks": [block.name for block in blueprint.blocks(index)],
            "num_parameters": blocks,
            "head_parameters": head,
            "tau": _finite(blueprint.taus[index]),
            "num_steps": summary.get("num_steps", blueprint.itinerary.sweep.num_updates(index, train.get("step", 0))),
            **{name: summary.get(name, train.get(name, 0)) for name in ("skipped_updates", "num_reused")},
            "valid_accuracy": rows.get("valid", {}).get("accuracy"),
            "valid_loss": rows.get("valid", {}).get("task_loss"),
            "test_accuracy": rows.get("test", {}).get("accuracy"),
            "test_loss": rows.get("test", {}).get("task_loss"),
            **{name: train.get(name) for name in ("local_loss", "task_loss", "transport_cost")},
            "transport_cost_by_block": train.get("transport_cost_by_block", {}),
            "geometry": {name: value for name, value in rows.get("geometry", {}).items() if name in _GEOMETRY},
            **{
                name: summary.get(name)
                for name in (
                    "train_s", "images_per_s", "compute_share", "wait_share", "send_wait_share", "cpu_s",
                    "bytes_sent",
                )
            },
            **_worker(rows, replica=0),
            "replicas": [_worker(rows, replica) for replica in range(blueprint.world.replicas[index])],
        }  # fmt: skip


def _worker(rows: dict[str, Row], replica: int) -> Row:
    """Where one replica of a stage ran, and the most memory that it held."""
    suffix = f"/{replica}" if replica else ""
    worker, memory = (rows.get(f"{kind}{suffix}", {}) for kind in ("worker", "memory"))
    return {"peak_rss_bytes": memory.get("peak_rss_bytes"), "host": worker.get("host"), "pid": worker.get("pid")}


def _precedes(row: Row, step: int) -> bool:
    """Whether a row was written before the checkpoint of `step`."""
    if "step" not in row:
        return True
    # a checkpoint is taken before the evaluation that follows its step
    return bool(row["step"] <= step if row["kind"] == "train" else row["step"] < step)


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if value != float("inf") else "inf"
