"""Replicas that die or are asked to end: the whole run starts again, or ends at one step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from tests.equivalence.runs import run, tiny
from tests.equivalence.test_replicas import assert_equal_final_weights
from tests.failure.conftest import Start


def test_a_killed_replica_ends_in_a_whole_restart_and_the_same_result(start: Start, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "pipeline": {"stages": 2, "replicas": [1, 2]}, "train": {"max_steps": 300, "epochs": 100, "drop_last": True},
        "checkpoint": {"every": 20}, "evaluate": {"batch": 8},
    }  # fmt: skip
    undisturbed = run(tiny("mlp", tmp_path / "undisturbed", launcher={"name": "threads"}, **sections))
    pipeline = start("launcher.max_failures=2", **sections)
    pipeline.wait_for_step(50, stage=1)
    pipeline.kill(2)
    code, errors = pipeline.finish()
    assert (code, errors) == (0, "")
    assert "starting all workers again" in pipeline.output
    assert_equal_final_weights(pipeline.run, undisturbed)


def test_a_signal_ends_all_replicas_of_stage_0_at_the_same_step(start: Start) -> None:
    pipeline = start(
        pipeline={"stages": 2, "replicas": [2, 1]},
        train={"max_steps": 100_000, "epochs": 100_000, "drop_last": True},
        evaluate={"batch": 8},
    )
    pipeline.wait_for_step(30, stage=1)
    pipeline.process.send_signal(signal.SIGTERM)
    code, errors = pipeline.finish()
    assert code == 130
    assert "error: stopped after step" in errors
