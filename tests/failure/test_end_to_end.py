"""End to end over workers: whatever ends one of them ends the run, with that error, and nothing is left behind."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.failure.conftest import Start
from tests.failure.pipelines import Pipeline
from tests.failure.test_stopping import ANNOUNCED, TORCHRUN

WHOLE: dict[str, Any] = {
    "pipeline": {"stages": 3}, "objective": {"name": "vangl", "transport": {}},
    "train": {"order": "end_to_end", "accumulate": 4, "drop_last": True, "max_steps": 100_000, "epochs": 10_000},
}  # fmt: skip
SHORT: dict[str, Any] = {**WHOLE, "train": {**WHOLE["train"], "max_steps": 300}}
BEATS = ("channel.heartbeat_s=0.2", "channel.heartbeat_timeout_s=2")


def started(start: Start, *overrides: str, **options: Any) -> Pipeline:
    pipeline = start(*overrides, **{**WHOLE, **options})
    pipeline.wait_for_step(5, stage=2)
    return pipeline


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_worker_ends_the_run_and_is_named(start: Start, stage: int) -> None:
    pipeline = started(start)
    pipeline.kill(stage)
    code, errors = pipeline.finish()
    assert code == 3
    assert f"stage {stage} (rank {stage}), process" in errors and "was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert pipeline.result()["status"] == "failed"


def test_a_stopped_rank_of_torchrun_is_named_though_the_others_wait_for_its_messages(start: Start) -> None:
    pipeline = started(start, *BEATS, command=TORCHRUN)
    pipeline.kill(1, signal.SIGSTOP)
    pipeline.wait_until(lambda: "stage 1 (rank 1) has given no sign of life for 2 s" in pipeline.errors, "its name")
    pipeline.kill(1)
    code, _ = pipeline.finish()
    assert code != 0
    assert "stage 1 (rank 1) has given no sign of life" in pipeline.result()["error"]


def test_a_loss_that_is_not_finite_ends_the_run_with_code_4(start: Start) -> None:
    pipeline = start("optim.lr=1e20", **WHOLE)
    code, errors = pipeline.finish()
    assert code == 4
    assert errors.startswith("error: stage 2, step ") and errors.endswith("lower optim.lr\n")


def test_a_signal_saves_the_same_step_everywhere_and_the_run_can_go_on(start: Start) -> None:
    pipeline = started(start, "launcher.name=local", **SHORT)
    pipeline.process.send_signal(signal.SIGTERM)
    code, errors = pipeline.finish()
    assert code == 130
    assert errors.startswith(f"SIGTERM: {ANNOUNCED}error: stopped after step ")
    (folder,) = (pipeline.run / "checkpoints").iterdir()
    assert (folder / "manifest.json").exists()
    resumed = start("checkpoint.resume=auto", **SHORT)
    assert resumed.finish() == (0, "")
    serial = tiny("mlp", pipeline.folder / "serial", launcher={"name": "serial"}, **SHORT)
    assert_equal_runs(resumed.run, run(serial))


def test_a_killed_worker_starts_the_whole_run_again_where_that_is_allowed(start: Start) -> None:
    pipeline = started(start, "launcher.max_failures=1", "checkpoint.every=5", **SHORT)
    pipeline.kill(1)
    code, errors = pipeline.finish()
    assert (code, errors) == (0, "")
    assert "starting all workers again from step" in pipeline.output
    assert pipeline.result()["status"] == "done"
