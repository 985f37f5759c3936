"""The test split, once: every head of a checkpoint is scored on it, after all choices have been made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import load
from pipetrgl.config.schema import Config
from pipetrgl.engine.checkpoint import Checkpoint, step_folder
from pipetrgl.engine.metrics import Row
from pipetrgl.launchers import serial
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.supervise import Budget
from pipetrgl.worker import Job


@dataclass(frozen=True)
class Score:
    """Of one head: share of right answers, and cross-entropy without smoothing."""

    accuracy: float
    loss: float


def score(run: Path, step: int, split: str = "test") -> list[Score | None]:
    """Score all heads of the checkpoint that a run saved after `step` optimizer steps; None for a stage without head.

    Args:
        split: "test", or "valid" to compare with what the run itself has recorded.
    Raises:
        ConfigError: the run holds no such checkpoint, or a damaged one.
    """
    config = _evaluating_only(load(run / "config.yaml"), step, split)
    job = Job(draw_up(config, describe(config)), run, dict(os.environ), Checkpoint.read(step_folder(run, step)))
    found: dict[int, Score] = {}

    def keep(row: Row) -> None:
        if row["kind"] == split:
            found[row["stage"]] = Score(row["accuracy"], row["task_loss"])

    serial.launch(job, keep, Budget(0))
    blueprint = job.blueprint
    return [found[stage] if blueprint.has_head(stage) else None for stage in range(blueprint.num_stages)]


def _evaluating_only(config: Config, step: int, split: str) -> Config:
    """A run that ends where the checkpoint does: its stream holds nothing but the evaluation, and it saves nothing."""
    evaluate = {"valid_every": float(split == "valid"), "test_at_end": split == "test"}
    changes = {
        "train": {"max_steps": step},
        "evaluate": evaluate,
        "run": {"save_final": False},
        "checkpoint": {"every": 0},
        "launcher": {"faults": []},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )
