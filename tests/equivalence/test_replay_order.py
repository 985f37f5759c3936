"""The replay order: equal to the parallel one wherever nothing is reused, and what holds where something is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.config.schema import Config
from tests.equivalence.runs import assert_equal_runs, metrics, run, tiny, weights
from tests.equivalence.test_resume import without_logs

SLOW_START = {"stage": 0, "step": 5, "action": "slow", "seconds": 0.05, "num_steps": 20}


def replay(folder: Path, launcher: str, replay: dict[str, int], /, **sections: Any) -> Config:
    """Three stages and 30 steps."""
    sections["launcher"] = {"name": launcher, **sections.get("launcher", {})}
    return tiny("resnet", folder, train={"order": "replay", "replay": replay}, pipeline={"stages": 3}, **sections)


def result(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return whole


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in the parallel order."""
    folder = tmp_path_factory.mktemp("parallel")
    return run(tiny("resnet", folder, pipeline={"stages": 3}, launcher={"name": "serial"}, checkpoint={"every": 7}))


@pytest.mark.parametrize("launcher", ["serial", "threads", "local"])
def test_one_use_is_the_parallel_order_bit_for_bit_however_late_a_stage_is(
    tmp_path: Path, parallel: Path, launcher: str
) -> None:
    faults = {"faults": [SLOW_START]}
    assert_equal_runs(without_logs(run(replay(tmp_path, launcher, {"max_reuse": 1}, launcher=faults))), parallel)


def test_in_the_serial_loop_nothing_is_ever_late(tmp_path: Path, parallel: Path) -> None:
    assert_equal_runs(run(replay(tmp_path, "serial", {"max_reuse": 9})), parallel)


@pytest.mark.parametrize("launcher", ["threads", "local"])
def test_a_slow_first_stage_is_what_it_would_be_and_those_behind_it_learn_more(
    tmp_path: Path, parallel: Path, launcher: str
) -> None:
    folder = run(replay(tmp_path, launcher, {"size": 4, "max_reuse": 3}, launcher={"faults": [SLOW_START]}))
    stages = result(folder)["stages"]
    assert [stage["num_steps"] for stage in stages] == [30, 30, 30]
    first, second, third = (stage["num_reused"] for stage in stages)
    assert first == 0
    assert 0 < second <= 2 * 29  # of the last micro-batch there is one use
    assert 0 <= third <= 2 * 29
    mine, theirs = metrics(without_logs(folder)), metrics(parallel)
    assert mine.keys() == theirs.keys()
    assert all(row == theirs[key] for key, row in mine.items() if row["stage"] == 0)
    counts = [row["num_reused"] for (kind, stage, _), row in mine.items() if (kind, stage) == ("train", 1)]
    assert counts == sorted(counts)
    assert counts[-1] == second  # nothing is reused after the last step
    mine_after, theirs_after = weights(folder), weights(parallel)
    different = {name for name, tensor in theirs_after.items() if not tensor.equal(mine_after[name])}
    blocks = [tuple(f"{block}." for block in stage["blocks"]) for stage in stages]
    assert not any(name.startswith(blocks[0]) for name in different)
    assert any(name.startswith(blocks[1]) for name in different)


def test_behind_a_delayed_link_a_stage_learns_more_as_well(tmp_path: Path) -> None:
    # a delay alone sets no pace: what is slow is stage 0, and tests/channels/test_delayed.py has what is on its way
    folder = run(replay(tmp_path, "threads", {}, channel={"delay_s": 0.02}, launcher={"faults": [SLOW_START]}))
    assert result(folder)["stages"][1]["num_reused"] > 0


def test_emulated_stages_reuse_as_real_ones_do(tmp_path: Path) -> None:
    times = {"forward_s": [0.01, 0.001], "backward_s": [0.01, 0.001]}
    pipeline = {"stages": 2, "device": "emulated", "emulated": times}
    train = {"order": "replay", "replay": {"max_reuse": 3}, "max_steps": 20}
    folder = run(tiny("mlp", tmp_path, pipeline=pipeline, train=train, launcher={"name": "threads"}))
    assert [stage["num_steps"] for stage in result(folder)["stages"]] == [20, 20]
    assert result(folder)["stages"][0]["num_reused"] == 0
    assert 0 < result(folder)["stages"][1]["num_reused"] <= 2 * 19


def test_a_run_goes_on_from_a_checkpoint_with_its_counts_and_an_empty_ring(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every": 10, "keep": 9, "resume": "auto"}}
    options["launcher"] = {"faults": [SLOW_START]}
    folder = run(replay(tmp_path, "threads", {}, **options))
    (folder / "result.json").unlink()
    for step in (20, 30):
        shutil.rmtree(folder / f"checkpoints/step-{step}")
    before = metrics(without_logs(folder))["train", 1, 10]["num_reused"]
    assert before > 0
    assert run(replay(tmp_path, "threads", {}, **options)) == folder
    assert result(folder)["first_step"] == 10
    stage = result(folder)["stages"][1]
    assert (stage["num_steps"], stage["num_reused"] > before) == (30, True)


def test_a_killed_stage_is_never_replaced_alone(tmp_path: Path) -> None:
    kill = {"stage": 1, "step": 10, "action": "kill"}
    options: dict[str, Any] = {"launcher": {"faults": [kill], "max_failures": 1}, "checkpoint": {"every": 7}}
    folder = run(replay(tmp_path, "local", {}, **options))
    assert result(folder)["recoveries"] == []
    assert re.search("starting all workers again from step [07]", (folder / "metrics.jsonl").read_text())
    assert all(stage["num_steps"] == 30 for stage in result(folder)["stages"])
