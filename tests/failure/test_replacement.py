"""A stage that dies is replaced alone: the others keep their processes, and the result is the undisturbed run's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.equivalence.test_resume import without_logs
from tests.failure.conftest import Start

FOUR: dict[str, Any] = {
    "pipeline": {"stages": 4},
    "train": {"max_steps": 1000, "epochs": 100},
    "checkpoint": {"every": 20},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny("mlp", tmp_path_factory.mktemp("undisturbed"), launcher={"name": "serial"}, **FOUR))


def test_killing_each_stage_in_turn_replaces_it_alone(start: Start, undisturbed: Path) -> None:
    pipeline = start("launcher.max_failures=4", **FOUR)
    #   step   60      260     460     660
    #   dies   stage 2 stage 0 stage 3 stage 1
    for step, stage in ((60, 2), (260, 0), (460, 3), (660, 1)):
        pipeline.wait_for_step(step, stage)
        before = pipeline.workers()
        pipeline.kill(stage)
        pipeline.wait_until(
            lambda before=before, stage=stage: pipeline.workers().get(stage, before[stage]) != before[stage],
            f"another stage {stage}",
        )
        after = pipeline.workers()
        assert {rank: pid for rank, pid in after.items() if rank != stage} == {
            rank: pid for rank, pid in before.items() if rank != stage
        }
    assert pipeline.finish() == (0, "")
    recoveries = pipeline.result()["recoveries"]
    assert [recovery["stage"] for recovery in recoveries] == [2, 0, 3, 1]
    # from its own newest checkpoint, not from the start
    assert all(0 <= recovery["step"] - recovery["from_step"] <= 40 for recovery in recoveries)
    assert all(0 < recovery["linked_s"] <= recovery["caught_up_s"] for recovery in recoveries)
    notes = [row["message"] for row in pipeline.rows("log")]
    assert [note.split("; ")[-1].partition(", from")[0] for note in notes] == [
        f"starting stage {stage} again alone" for stage in (2, 0, 3, 1)
    ]
    assert_equal_runs(without_logs(pipeline.run), undisturbed)


def test_a_stopped_worker_is_replaced_when_its_heartbeat_stays_away(start: Start, undisturbed: Path) -> None:
    pipeline = start("launcher.max_failures=1", "channel.heartbeat_s=0.5", "channel.heartbeat_timeout_s=5", **FOUR)
    pipeline.wait_for_step(100, stage=1)
    before = pipeline.workers()
    pipeline.kill(1, signal.SIGSTOP)
    assert pipeline.finish() == (0, "")
    (note,) = pipeline.rows("log")
    assert note["message"].startswith("stage 1 (rank 1) has given no sign of life for 5 s")
    assert len(before) == 4
    assert_equal_runs(without_logs(pipeline.run), undisturbed)


@pytest.mark.parametrize(
    ("killed", "overrides"),
    [
        ([1, 2], []),  # two neighbours die together
        ([1], ["channel.log_bytes=1"]),  # stage 0 kept nothing for stage 1
        ([1], ["launcher.restart=run"]),
    ],
    ids=["neighbours", "small-log", "by-option"],
)
def test_where_a_stage_cannot_be_replaced_alone_the_whole_run_starts_again(
    start: Start, undisturbed: Path, killed: list[int], overrides: list[str]
) -> None:
    pipeline = start("launcher.max_failures=3", *overrides, **FOUR)
    pipeline.wait_for_step(100, stage=3)
    before = pipeline.workers()
    for stage in killed:
        pipeline.kill(stage)
    pipeline.wait_until(lambda: not set(before.values()) & set(pipeline.workers().values()), "four other workers")
    assert pipeline.finish() == (0, "")
    assert "starting all workers again from step" in pipeline.rows("log")[-1]["message"]
    assert_equal_runs(without_logs(pipeline.run), undisturbed)


def test_more_failures_than_allowed_end_the_run_with_the_last_one(start: Start) -> None:
    pipeline = start("launcher.max_failures=1", **FOUR)
    pipeline.wait_for_step(60, stage=3)
    first = pipeline.workers()[2]
    pipeline.kill(2)
    pipeline.wait_until(lambda: pipeline.workers().get(2, first) != first, "another stage 2")
    pipeline.wait_for_step(max(row["step"] for row in pipeline.rows()) + 20, stage=2)
    pipeline.kill(0)
    code, errors = pipeline.finish()
    assert code == 3
    assert "error: stage 0 (rank 0), process" in errors
    assert "was killed by SIGKILL" in errors
