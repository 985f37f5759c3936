"""InfoPro's images ride along the pipeline, in training and not to the last stage: bit-equal to the serial loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.config.schema import Config
from tests.equivalence.runs import assert_equal_runs, run, tiny, weights
from tests.equivalence.test_replicas import SHORT, assert_close_runs
from tests.equivalence.test_resume import without_logs

IMAGE_BYTES = 3 * 8 * 8 * 4
ROWS = 122 + 14 * 8
"""Training rows of 30 steps: an epoch of 122 is 16 steps, the last one of 2 rows. Evaluations carry no image."""


def infopro(folder: Path, launcher: str, /, target: str = "image", **sections: Any) -> Config:
    objective = {"name": "infopro", "infopro": {"target": target, "reconstruction": [2.0, 1.0]}, "transport": {}}
    sections = {"pipeline": {"stages": 4}, **sections}
    launchers = {"name": launcher, **sections.pop("launcher", {})}
    return tiny("resnet", folder, objective=objective, launcher=launchers, **sections)


@pytest.mark.parametrize("launcher", ["threads", "local"])
@pytest.mark.parametrize("channel", [{"codec": "fp32", "capacity": 1}, {"codec": "int8", "capacity": 3}])
def test_four_workers_equal_serial(tmp_path: Path, launcher: str, channel: dict[str, Any]) -> None:
    parallel = run(infopro(tmp_path / "p", launcher, channel=channel))
    assert_equal_runs(parallel, run(infopro(tmp_path / "s", "serial", channel=channel)))


def test_a_link_with_a_delay_keeps_the_images(tmp_path: Path) -> None:
    slow = run(infopro(tmp_path / "p", "local", channel={"delay_s": 0.01, "jitter_s": 0.01, "capacity": 1}))
    assert_equal_runs(slow, run(infopro(tmp_path / "s", "serial")))


@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_frozen_stages_pass_the_image_on_and_idle_ones_get_none(tmp_path: Path, order: str) -> None:
    train = {"order": order, "epochs": 1, "max_steps": None}
    threads = run(infopro(tmp_path / "p", "threads", train=train))
    assert_equal_runs(threads, run(infopro(tmp_path / "s", "serial", train=train)))


def test_links_carry_an_image_with_every_training_row_and_none_to_the_last_stage(tmp_path: Path) -> None:
    def sent(target: str) -> list[int]:
        folder = run(infopro(tmp_path / target, "local", target))
        return [stage["bytes_sent"] for stage in json.loads((folder / "result.json").read_text())["stages"]]

    more = [image - plain for image, plain in zip(sent("image"), sent("input"), strict=True)]
    assert more == [ROWS * IMAGE_BYTES, ROWS * IMAGE_BYTES, 0, 0]


def test_the_image_reaches_every_stage_that_reconstructs_it(tmp_path: Path) -> None:
    state = weights(run(infopro(tmp_path, "threads")))
    written = [tuple(tensor.shape[:2]) for name, tensor in state.items() if name.endswith("decoder.conv2.weight")]
    assert written == [(3, 12)] * 3


def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": {"schedule": {"name": "constant"}}}
    whole = run(infopro(tmp_path / "whole", "threads", **options))
    half = run(infopro(tmp_path / "half", "threads", train={"max_steps": 14}, **options))
    resumed = run(infopro(tmp_path / "half", "threads", checkpoint={"resume": str(half)}, **options))
    mine, theirs = weights(resumed), weights(whole)
    assert all(mine[key].equal(tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("replicas", [[1, 2, 1], [2, 3, 1]])
def test_replicas_with_synchronised_batch_norm_equal_one(tmp_path: Path, replicas: list[int]) -> None:
    pipeline = {"stages": 3, "replicas": replicas, "batch_norm": "synchronised"}
    many = run(infopro(tmp_path / "p", "threads", **SHORT | {"pipeline": pipeline}))
    assert_close_runs(many, run(infopro(tmp_path / "s", "serial", **SHORT | {"pipeline": {"stages": 3}})))


def test_a_stage_that_dies_gets_its_images_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": {"max_steps": 200, "epochs": 100}, "checkpoint": {"every": 20}}
    fault = {"stage": 2, "step": 110, "action": "kill"}
    launcher = {"max_failures": 1, "faults": [fault]}
    disturbed = run(infopro(tmp_path / "p", "local", **options, launcher=launcher))
    (recovery,) = json.loads((disturbed / "result.json").read_text())["recoveries"]
    assert recovery["stage"] == 2
    assert_equal_runs(without_logs(disturbed), run(infopro(tmp_path / "s", "serial", **options)))


def test_emulated_stages_send_the_bytes_of_images(tmp_path: Path) -> None:
    emulated = {"stages": 3, "device": "emulated", "emulated": {"forward_s": 0.0, "backward_s": 0.0}}
    sent = {}
    for target in ("image", "input"):
        folder = run(infopro(tmp_path / target, "threads", target, pipeline=emulated))
        stages = json.loads((folder / "result.json").read_text())["stages"]
        sent[target] = [stage["bytes_sent"] for stage in stages]
    assert [a - b for a, b in zip(sent["image"], sent["input"], strict=True)] == [ROWS * IMAGE_BYTES, 0, 0]
