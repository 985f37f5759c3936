"""The record of a run: what its folder holds, finished or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipetrgl.errors import ConfigError
from pipetrgl.studies import plots


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        config, config_text: the resolved config, parsed and as written.
        rows: the metrics, oldest first.
        result: result.json; where that is missing, the same shape with what the config and the metrics know.
        events: the trace's events; none if no trace was recorded.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def num_stages(self) -> int:
        return int(self.result["num_stages"])


def read_run(run: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        ConfigError: no config.yaml, or a damaged file; a half-written last line of metrics.jsonl is no damage.
    """
    config_path = run / "config.yaml"
    if not config_path.is_file():
        raise ConfigError(f"{run} is not a run folder: it holds no config.yaml")
    config_text = config_path.read_text(encoding="utf-8")
    config = yaml.safe_load(config_text) or {}
    rows = _read_rows(run / "metrics.jsonl")
    # A run that failed early leaves a result with gaps: what the metrics know fills them.
    found = _read_json(run / "result.json") or {}
    known = {key: value for key, value in found.items() if value not in (None, [], {})}
    trace = _read_json(run / "trace.json") or {}
    return RunRecord(
        folder=run,
        config=config,
        config_text=config_text,
        rows=rows,
        result={**_unfinished(run.name, config, rows), **known},
        events=trace.get("traceEvents", []),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # A run killed while it writes leaves half a line, perhaps half a character, and no newline after it.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if place < len(lines):
                raise ConfigError(f"{path} line {place}: not JSON: {error.msg}") from error
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} line {error.lineno}: not JSON: {error.msg}") from error
    return content


def _unfinished(name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shape of result.json for a run that left none: what the config and the metrics know, nothing else."""
    seen = 1 + max((row["stage"] for row in rows), default=-1)
    num_stages = max((config.get("pipeline") or {}).get("stages", 1), seen)
    # A validation counts once every head has it: only then can heads be compared.
    valid = [heads for heads in plots.evaluations(rows, "valid").values() if len(heads) == num_stages]
    test = [heads for heads in plots.evaluations(rows, "test").values() if len(heads) == num_stages]
    last_train = {row["stage"]: row for row in rows if row["kind"] == "train"}
    geometry = {row["stage"]: row for row in rows if row["kind"] == "geometry"}
    stages = []
    for stage in range(num_stages):
        row = last_train.get(stage, {})
        costs = row.get("transport_cost_by_block") or {}
        measured = ("local_loss", "task_loss", "transport_cost", "images_per_s", "wait_share")
        stages.append(
            {
                "stage": stage,
                "blocks": list(costs),
                "valid_accuracy": valid[-1][stage] if valid else None,
                "test_accuracy": test[-1][stage] if test else None,
                "transport_cost_by_block": costs,
                "geometry": geometry.get(stage, {}),
                **{key: row.get(key) for key in measured},
            }
        )
    return {
        "status": "unfinished",
        "name": (config.get("run") or {}).get("name", name),
        "launcher": (config.get("launcher") or {}).get("name"),
        "num_stages": num_stages,
        "num_steps": max((row["step"] for row in last_train.values()), default=None),
        "stages": stages,
        "best_head": max(valid[-1], key=lambda stage: (valid[-1][stage], -stage)) if valid else None,
        "last_head": num_stages - 1,
    }
