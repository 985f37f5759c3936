"""End to end, K workers, one process and plain backpropagation in one stage train the same weights, bit for bit.

Bit for bit also with BatchNorm: every micro-batch holds the same rows, and gradients are added up in their order, the
same on each side of a cut.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import dump
from pipetrgl.config.schema import Config
from pipetrgl.engine.end_to_end import EndToEnd, divided
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import Split
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import MODELS, assert_equal_runs, metrics, run, tiny, weights
from tests.equivalence.test_resume import break_once, without_logs

VANGL: dict[str, Any] = {"name": "vangl", "transport": {}}


def whole(model: str, folder: Path, launcher: str, stages: int, /, **sections: Any) -> Config:
    """A tiny run end to end, of four micro-batches a step."""
    train = {"order": "end_to_end", "accumulate": 4, "drop_last": True, **sections.pop("train", {})}
    pipeline, name = {"stages": stages}, {"name": launcher, **sections.pop("launcher", {})}
    return tiny(model, folder, objective=VANGL, pipeline=pipeline, launcher=name, train=train, **sections)


@pytest.mark.parametrize(
    ("model", "stages", "schedule", "num_micro_batches"),
    [
        ("resnet", 3, "1f1b", 4),
        ("vit", 2, "gpipe", 1),
        ("vgg", 2, "1f1b", 2),
        ("mlp", 2, "gpipe", 4),
        ("gpt", 2, "1f1b", 4),
    ],
)
def test_workers_equal_one_process(
    tmp_path: Path, model: str, stages: int, schedule: str, num_micro_batches: int
) -> None:
    train = {"schedule": schedule, "accumulate": num_micro_batches}
    workers = run(whole(model, tmp_path / "workers", "local", stages, train=train))
    one_process = run(whole(model, tmp_path / "serial", "serial", stages, train=train))
    assert_equal_runs(workers, one_process)


def test_torchrun_equals_one_process(tmp_path: Path) -> None:
    config = whole("resnet", tmp_path / "runs", "local", 2)
    (tmp_path / "config.yaml").write_text(dump(config))
    root = Path(__file__).resolve().parents[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(root / "launch" / "torchrun.sh"), str(tmp_path / "config.yaml")]
    environ = {**os.environ, "NPROC": "2", "PATH": path}
    subprocess.run(command, env=environ, check=True, capture_output=True, cwd=tmp_path, timeout=180)
    (folder,) = (tmp_path / "runs").iterdir()
    assert_equal_runs(folder, run(whole("resnet", tmp_path / "serial", "serial", 2)))


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_stages_in_one_process_equal_plain_greedy_learning_with_one_stage(
    tmp_path: Path, model: str, num_micro_batches: int
) -> None:
    # three micro-batches of 8 rows are unequal, and the last step of an epoch is smaller
    train = {"accumulate": num_micro_batches, "drop_last": False}
    mine = weights(run(whole(model, tmp_path / "a", "serial", 3, train=train)))
    greedy = tiny(
        model, tmp_path / "b", objective=VANGL, pipeline={"stages": 1}, launcher={"name": "serial"}, train=train
    )
    theirs = weights(run(greedy))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []


@pytest.mark.parametrize("launcher", ["threads", "local"])
def test_a_single_worker_of_any_launcher_equals_one_process(tmp_path: Path, launcher: str) -> None:
    one = run(whole("mlp", tmp_path / "a", launcher, 1))
    assert_equal_runs(one, run(whole("mlp", tmp_path / "b", "serial", 1)))


def test_a_run_that_starts_again_on_workers_equals_one_process_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(whole("resnet", tmp_path / "a", "serial", 2, checkpoint={"every": 7}))
    break_once(monkeypatch, 1, 16)
    once = {"max_failures": 1}
    disturbed = run(whole("resnet", tmp_path / "b", "serial", 2, checkpoint={"every": 7}, launcher=once))
    assert_equal_runs(without_logs(disturbed), undisturbed)
    saved = {"resume": str(undisturbed / "checkpoints" / "step-28")}
    resumed = run(whole("resnet", tmp_path / "c", "local", 2, checkpoint=saved))
    assert all(tensor.equal(weights(undisturbed)[name]) for name, tensor in weights(resumed).items())


def test_gradients_reach_every_stage_from_one_loss_at_the_last_head(tmp_path: Path) -> None:
    config = whole("resnet", tmp_path, "serial", 3)
    blueprint = draw_up(config, describe(config))
    stages = [build_stage(blueprint, index, torch.device("cpu")) for index in range(3)]
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        batch = next(batch for batch in loader if batch.split is Split.TRAIN)
    output = EndToEnd(stages, config.train).forward(batch, train=True)
    assert output.trained and output.logits.shape == (8, 4)
    for stage in stages:
        assert all(parameter.grad is not None for _, parameter in stage.named_parameters())
    heads = [[name for name, _ in stage.named_parameters() if name.startswith("heads.")] for stage in stages]
    assert heads[:2] == [[], []] and heads[2] != []


def test_a_step_is_divided_as_the_loader_of_the_other_orders_divides_it(tmp_path: Path) -> None:
    def rows(end_to_end: bool) -> list[range]:
        train = {"accumulate": 3, "drop_last": False}
        config = whole("mlp", tmp_path, "serial", 1, train=train)
        if not end_to_end:
            config = tiny("mlp", tmp_path, pipeline={"stages": 1}, train=train)
        stream = list(build_loader(Job(draw_up(config, describe(config)), tmp_path, {})))
        steps = [batch for batch in stream if batch.split is Split.TRAIN]
        parts = [part for step in steps for part in divided(step, config.train)] if end_to_end else steps
        return [part.rows for part in parts]

    assert rows(end_to_end=True) == rows(end_to_end=False)
    assert rows(end_to_end=True)[:3] == [range(3), range(3, 6), range(6, 8)]


def test_only_the_last_head_is_scored_and_every_worker_reports_its_speed(tmp_path: Path) -> None:
    rows = metrics(run(whole("mlp", tmp_path, "serial", 2)))
    assert {stage for kind, stage, _ in rows if kind in ("valid", "test")} == {1}
    first, last = rows["train", 0, 10], rows["train", 1, 10]
    assert first["task_loss"] is first["accuracy"] is first["transport_cost"] is last["transport_cost"] is None
    assert last["task_loss"] > 0 and first["lr"] == last["lr"]
