"""What comes after a run: the heads of a checkpoint are scored, or one of them is exported with what it stands on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import load
from pipetrgl.config.schema import Config
from pipetrgl.engine.checkpoint import Checkpoint, newest_complete, step_folder
from pipetrgl.engine.metrics import Row
from pipetrgl.errors import ConfigError
from pipetrgl.export import export
from pipetrgl.launchers import serial
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.supervise import Budget
from pipetrgl.worker import Job


@dataclass(frozen=True)
class Score:
    """Of one head: share of right answers, and cross-entropy without smoothing."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Exported:
    """A file that holds the network up to the head of a stage, as it was after `step` optimizer steps."""

    path: Path
    head: int
    step: int
    num_bytes: int


def score(run: Path, checkpoint: Checkpoint, split: str = "test") -> list[Score | None]:
    """Score all heads of a run's checkpoint; None for a stage without head.

    Args:
        split: "test", or "valid" to compare with what the run itself has recorded.
    Raises:
        DataError: the data set is missing or damaged.
    """
    config = _evaluating_only(load(run / "config.yaml"), checkpoint.step, split)
    job = Job(draw_up(config, describe(config)), run, dict(os.environ), checkpoint)
    found: dict[int, Score] = {}

    def keep(row: Row) -> None:
        if row["kind"] == split:
            found[row["stage"]] = Score(row["accuracy"], row["task_loss"])

    serial.launch(job, keep, Budget(0))
    blueprint = job.blueprint
    return [found[stage] if blueprint.has_head(stage) else None for stage in range(blueprint.num_stages)]


def export_run(run: Path, step: int | None, head: str, path: Path) -> Exported:
    """Write the network of a run up to one head as a file for `pipetrgl.export.load`.

    Args:
        step: of the checkpoint; None: the newest.
        head: "best" on the validation split, "last", or the number of a stage.
    Raises:
        ConfigError: this is no run folder, or it has no such checkpoint or head; or the file cannot be written.
    """
    checkpoint, config = checkpoint_of(run, step), load(run / "config.yaml")
    blueprint = draw_up(config, describe(config))
    chosen = _head(run, head, blueprint.num_stages)
    if not blueprint.has_head(chosen):
        raise ConfigError(f"--head: stage {chosen} has none; end to end only the last stage does")
    try:
        num_bytes = export(blueprint, checkpoint, chosen, path)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{path}': {error.strerror}") from error
    return Exported(path, chosen, checkpoint.step, num_bytes)


def checkpoint_of(run: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a run after so many steps, or its newest.

    Raises:
        ConfigError: this is no run folder, or it has no such checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run folder: it holds no config.yaml")
    found = newest_complete(run) if step is None else Checkpoint.read(step_folder(run, step))
    if found is None:
        raise ConfigError(f"{run} holds no complete checkpoint; was it trained with run.save_final: false?")
    return found


def _head(run: Path, head: str, num_stages: int) -> int:
    """The stage that `--head` means."""
    if head == "last":
        return num_stages - 1
    if head == "best":
        try:
            best = json.loads((run / "result.json").read_text(encoding="utf-8"))["best_head"]
        except (OSError, ValueError, KeyError):
            best = None
        if best is None:
            raise ConfigError(f"--head: {run} names no best head, for no validation has passed all of them; name one")
        return int(best)
    if not head.isdecimal() or int(head) >= num_stages:
        raise ConfigError(f"--head: '{head}' is not allowed. Allowed: best, last, 0 to {num_stages - 1}.")
    return int(head)


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
