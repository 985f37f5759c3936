"""Measured peaks: the workers of a run, started for a few steps, say how much memory they ever held."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipetrgl.blueprint import Blueprint
from pipetrgl.config.schema import Config
from pipetrgl.engine.metrics import Row
from pipetrgl.launchers.start import train

_KEPT_OF_TRAIN = {"batch", "accumulate", "deterministic", "keep_memory", "threads"}


def peak_rss(config: Config, num_steps: int) -> tuple[int, ...]:
    """Peak resident bytes of every stage's worker process on this machine, Python and torch included.

    Args:
        config: of the run; trained in the parallel order, without evaluation, checkpoints or rehearsed failures.
        num_steps: optimizer steps.
    Raises:
        PipetrglError: the run's first error.
    """
    return _peaks(_shortened(config, num_steps))


def peak_rss_end_to_end(config: Config, num_steps: int) -> int:
    """Of one worker that trains the same network end to end: a single stage without transport cost."""
    content = _shortened(config, num_steps)
    content["pipeline"] = {**content.get("pipeline", {}), "stages": 1, "replicas": 1}
    content["model"] = {name: value for name, value in content.get("model", {}).items() if name != "cuts"}
    content["objective"] = {"name": "vangl", "label_smoothing": config.objective.label_smoothing}
    return _peaks(content)[0]


def _shortened(config: Config, num_steps: int) -> dict[str, Any]:
    content: dict[str, Any] = config.model_dump(exclude_unset=True)
    kept = {name: value for name, value in content.get("train", {}).items() if name in _KEPT_OF_TRAIN}
    return {
        **content,
        "train": {**kept, "max_steps": num_steps},
        "evaluate": {"valid_every": 0.0, "test_at_end": False},
        "launcher": {"name": "local"},
        "metrics": {},
        "trace": {"num_steps": 0},
        "checkpoint": {},
    }


def _peaks(content: dict[str, Any]) -> tuple[int, ...]:
    peaks: dict[int, int] = {}

    def note(row: Row) -> None:
        if row["kind"] == "memory":
            peaks[row["stage"]] = row["peak_rss_bytes"]

    def open_display(blueprint: Blueprint, run: Path) -> Callable[[Row], None]:
        return note

    with tempfile.TemporaryDirectory(prefix="pipetrgl-memory-") as folder:
        run = {"folder": folder, "save_final": False, "report": False}
        train(Config.model_validate({**content, "run": run}), open_display)
    return tuple(peaks[stage] for stage in sorted(peaks))
