"""Rehearsed failures: each action on each stage does what it says, once in the life of a run folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl.config.load import dump
from pipetrgl.config.schema import Config, FaultConfig
from pipetrgl.engine import faults
from pipetrgl.engine.faults import FaultyStage, rehearse
from pipetrgl.errors import DivergedError, LaunchError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import StageOutput
from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.equivalence.test_resume import without_logs

STAGES = [0, 1, 2]


def rehearsal(folder: Path, launcher: str, *planned: dict[str, Any], max_failures: int = 0, **sections: Any) -> Config:
    """Three stages and 30 steps, a checkpoint every 7, that go on in the same run folder when run again."""
    options = {"name": launcher, "faults": list(planned), "max_failures": max_failures}
    sections = {"pipeline": {"stages": 3}, "checkpoint": {"every": 7, "resume": "auto"}, **sections}
    return tiny("mlp", folder, launcher=options, **sections)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(rehearsal(tmp_path_factory.mktemp("undisturbed"), "serial"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_the_run_once_and_resuming_equals_never_failing(
    tmp_path: Path, undisturbed: Path, stage: int
) -> None:
    config = rehearsal(tmp_path, "local", {"stage": stage, "step": 10, "action": "kill"})
    with pytest.raises(LaunchError, match=rf"stage {stage} \(rank {stage}\), process \d+, was killed by SIGKILL") as e:
        run(config)
    assert e.value.exit_code == 3
    again = run(config)
    assert [file.name for file in (again / "faults").iterdir()] == [f"0-stage-{stage}-step-10"]
    assert_equal_runs(without_logs(again), undisturbed)


def test_a_run_that_restarts_itself_after_two_faults_equals_an_undisturbed_one(
    tmp_path: Path, undisturbed: Path
) -> None:
    planned = [{"stage": 1, "step": 20, "action": "raise"}, {"stage": 2, "step": 10, "action": "kill"}]
    folder = run(rehearsal(tmp_path, "local", *planned, max_failures=2))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "\n".join(row["message"] for row in rows if row["kind"] == "log")
    assert "stage 2 (rank 2), process" in text
    assert "stage 1 (rank 1) failed: RuntimeError: fault injected: raise of stage 1 at step 20" in text
    assert sorted(file.name for file in (folder / "faults").iterdir()) == ["0-stage-1-step-20", "1-stage-2-step-10"]
    assert_equal_runs(without_logs(folder), undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_raised_fault_looks_like_a_bug_and_happens_once(tmp_path: Path, undisturbed: Path, stage: int) -> None:
    config = rehearsal(tmp_path, "threads", {"stage": stage, "step": 10, "action": "raise"})
    with pytest.raises(RuntimeError, match=f"fault injected: raise of stage {stage} at step 10"):
        run(config)
    assert_equal_runs(run(config), undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_hangs_is_named_before_its_neighbours_give_up(tmp_path: Path, stage: int) -> None:
    planned = {"stage": stage, "step": 10, "action": "hang"}
    sections: dict[str, Any] = {"channel": {"wait_timeout_s": 10.0, "capacity": 1}}
    with pytest.raises(
        LaunchError, match=rf"stage {stage} \(rank {stage}\), step 10: forward has taken more than 5 s; it hangs"
    ) as e:
        run(rehearsal(tmp_path, "local", planned, **sections))
    assert e.value.exit_code == 3


def test_a_stage_that_hangs_is_replaced_alone(tmp_path: Path, undisturbed: Path) -> None:
    planned = {"stage": 1, "step": 10, "action": "hang"}
    config = rehearsal(tmp_path, "local", planned, max_failures=1, channel={"wait_timeout_s": 10.0})
    folder = run(config)
    (recovery,) = json.loads((folder / "result.json").read_text())["recoveries"]
    assert (recovery["stage"], recovery["from_step"]) == (1, 7)
    assert_equal_runs(without_logs(folder), undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_fault_diverges_there_and_is_not_restarted(tmp_path: Path, stage: int) -> None:
    planned = {"stage": stage, "step": 10, "action": "nan"}
    with pytest.raises(DivergedError, match=f"stage {stage}, the input, step 10: the activation is not finite") as e:
        run(rehearsal(tmp_path, "threads", planned, max_failures=1))
    assert e.value.exit_code == 4
    (folder,) = tmp_path.iterdir()
    assert not (folder / "faults").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_stage_changes_no_result(tmp_path: Path, undisturbed: Path, stage: int) -> None:
    planned = {"stage": stage, "step": 10, "action": "slow", "seconds": 0.05, "num_steps": 4}
    assert_equal_runs(run(rehearsal(tmp_path, "threads", planned)), undisturbed)


def test_kill_means_the_whole_program_where_all_stages_share_one(tmp_path: Path) -> None:
    config = rehearsal(tmp_path / "runs", "serial", {"stage": 1, "step": 3, "action": "kill"})
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "pipetrgl", "train", "config.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL


class Recorded:
    """A stage that keeps what it is given."""

    index = 1

    def __init__(self) -> None:
        self.given: list[MicroBatch] = []

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        self.given.append(micro_batch)
        return None  # type: ignore[return-value]

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None: ...

    def update(self) -> None: ...


def micro_batch(step: int, part: int, split: Split = Split.TRAIN) -> MicroBatch:
    """Two rows of a step of four."""
    rows = torch.arange(2)
    return MicroBatch(torch.ones(2, 1), rows, rows, split, 0, step, 0, 2 * part, 4, part == 1, part == 1)


Meet = Callable[[dict[str, Any]], list[MicroBatch]]


@pytest.fixture
def meet(tmp_path: Path) -> Meet:
    def meet(values: dict[str, Any]) -> list[MicroBatch]:
        """Four steps of two micro-batches, with an evaluation before each, and what the stage then saw."""
        inner = Recorded()
        stage = rehearse(inner, [FaultConfig.model_validate({"stage": 1, "step": 1, **values})], tmp_path)
        for step in range(4):
            for each in (micro_batch(step, 0, Split.VALID), micro_batch(step, 0), micro_batch(step, 1)):
                stage.forward(each, each.split is Split.TRAIN)
        return inner.given

    return meet


def test_nan_poisons_the_first_training_micro_batch_of_each_of_its_steps(meet: Meet) -> None:
    given = meet({"action": "nan", "num_steps": 2})
    poisoned = [(seen.split.label, seen.step, seen.row_start) for seen in given if bool(seen.activation.isnan().all())]  # type: ignore[union-attr]
    assert poisoned == [("train", 1, 0), ("train", 2, 0)]


def test_slow_sleeps_once_before_each_of_its_steps(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    assert all(bool((seen.activation == 1).all()) for seen in meet({"action": "slow", "seconds": 2, "num_steps": 3}))  # type: ignore[union-attr]
    assert slept == [2.0, 2.0, 2.0]


def test_a_fault_that_has_happened_in_this_run_folder_does_not_happen_again(meet: Meet, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fault injected: raise of stage 1 at step 1"):
        meet({"action": "raise"})
    assert len(meet({"action": "raise"})) == 12
    assert len(list((tmp_path / "faults").iterdir())) == 1


def test_only_the_stage_that_is_named_is_wrapped(tmp_path: Path) -> None:
    inner = Recorded()
    planned = [FaultConfig(stage=stage, step=0, action="nan") for stage in (0, 2)]
    assert rehearse(inner, planned, tmp_path) is inner
    assert isinstance(rehearse(inner, [FaultConfig(stage=1, step=0, action="nan")], tmp_path), FaultyStage)
