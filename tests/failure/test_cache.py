"""A worker that dies takes its cache with it: nothing of it stays on disk, and the run starts again as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.equivalence.runs import assert_equal_runs, run
from tests.equivalence.test_cache import cached
from tests.equivalence.test_resume import without_logs


def test_a_learner_killed_while_it_recalls_is_made_good_by_all_workers_together(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every": 5}}
    undisturbed = run(cached("none", "resnet", tmp_path / "a", "sequential", 2, "serial", **options))
    #  stage 1 learns in steps 14 to 34, and recalls from 21 on
    fault = {"stage": 1, "step": 24, "action": "kill"}
    again = {"launcher": {"faults": [fault], "max_failures": 1}}
    disturbed = run(cached("disk", "resnet", tmp_path / "b", "sequential", 2, "local", **options, **again))
    rows = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    (note,) = [row["message"] for row in rows if row["kind"] == "log" and "again" in row["message"]]
    assert "was killed by SIGKILL; starting all workers again from step " in note
    known = {".lock", "checkpoints", "config.yaml", "env.json", "faults", "logs", "metrics.jsonl", "result.json"}
    assert {entry.name for entry in disturbed.iterdir()} - {"trace.json", "errors"} == known
    assert_equal_runs(without_logs(disturbed), undisturbed)
