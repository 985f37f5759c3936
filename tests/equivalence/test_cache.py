"""`train.cache` in the sequential and multi-lap orders: what is recalled changes no bit, and saves what it promises."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import Images, Indices, SubsetSamples
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput
from tests.equivalence.runs import assert_equal_runs, run
from tests.equivalence.test_orders import STEPS_PER_EPOCH, ordered

PLAIN = {"samples": 56, "crop_padding": 0, "flip": False}  # 50 training images in batches of 8, the last one of 2
NO_EVALUATION = {"valid_every": 0.0, "at_start": False, "test_at_end": False}


def cached(
    cache: str, model: str, folder: Path, order: str, stages: int, launcher: str = "serial", /, **sections: Any
) -> Config:
    """Stages learn for 2, 3, .. epochs."""
    sections["train"] = {"epochs": 2, "cache": cache, **sections.get("train", {})}
    return ordered(model, folder, order, stages, launcher, data=PLAIN, **sections)


@pytest.mark.parametrize("model", ["resnet", "vit"])
@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_recalling_equals_forwarding_anew(tmp_path: Path, order: str, model: str) -> None:
    plain = run(cached("none", model, tmp_path / "none", order, 3))
    assert_equal_runs(run(cached("memory", model, tmp_path / "memory", order, 3)), plain)
    assert_equal_runs(run(cached("disk", model, tmp_path / "disk", order, 3, "threads")), plain)


@pytest.mark.parametrize(("order", "cache", "codec"), [("sequential", "disk", "int8"), ("multi_lap", "memory", "fp32")])
def test_local_processes_that_recall_equal_the_serial_loop_that_does_not(
    tmp_path: Path, order: str, cache: str, codec: str
) -> None:
    options = {"channel": {"codec": codec}}
    local = run(cached(cache, "resnet", tmp_path / "local", order, 3, "local", **options))
    assert_equal_runs(local, run(cached("none", "resnet", tmp_path / "serial", order, 3, **options)))


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ("resnet", {"drop_last": True, "epochs": 4}),  # 2 images are left out of each epoch
        ("vit", {"batch": 7}),  # a rest of one image is
        ("resnet", {"accumulate": 3, "precision": "bf16", "channels_last": True}),
        ("mlp", {"drop_last": True}),
        ("vgg", {"max_steps": 5 * STEPS_PER_EPOCH + 3}),
    ],
)
def test_recalling_equals_forwarding_anew_with(tmp_path: Path, model: str, train: dict[str, Any]) -> None:
    plain = run(cached("none", model, tmp_path / "none", "sequential", 3, train=train))
    assert_equal_runs(run(cached("memory", model, tmp_path / "memory", "sequential", 3, train=train)), plain)


def test_an_objective_that_reads_the_stages_input_reads_what_is_recalled(tmp_path: Path) -> None:
    options = {"objective": {"name": "infopro", "infopro": {"target": "input"}, "transport": {"tau": 0.5}}}
    plain = run(cached("none", "resnet", tmp_path / "none", "sequential", 3, **options))
    assert_equal_runs(run(cached("memory", "resnet", tmp_path / "memory", "sequential", 3, **options)), plain)


@pytest.mark.parametrize("launcher", ["serial", "threads"])
def test_frozen_stages_run_forward_and_images_are_read_in_the_first_epoch_of_a_phase_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    forward, read = Stage.forward, SubsetSamples.read
    forwards: Counter[tuple[int, bool]] = Counter()
    images: list[int] = []

    def counted(self: Stage, micro_batch: MicroBatch, train: bool) -> StageOutput:
        forwards[self.index, train] += 1
        return forward(self, micro_batch, train)

    def noted(self: SubsetSamples, indices: Indices) -> Images:
        images.append(len(indices))
        return read(self, indices)

    monkeypatch.setattr(Stage, "forward", counted)
    monkeypatch.setattr(SubsetSamples, "read", noted)
    run(cached("memory", "mlp", tmp_path, "sequential", 3, launcher, evaluate=NO_EVALUATION))
    #  epochs      2 of stage 0   3 of stage 1   4 of stage 2
    #  stage 0     learns         hands on once  hands on once
    #  stage 1                    learns         hands on once
    epochs = {(0, True): 2, (1, True): 3, (2, True): 4, (0, False): 2, (1, False): 1}
    assert forwards == {what: count * STEPS_PER_EPOCH for what, count in epochs.items()}
    assert sum(images) == (2 + 1 + 1) * 50


def test_an_activation_crosses_a_link_in_the_first_epoch_of_a_phase_only(tmp_path: Path) -> None:
    config = cached("disk", "mlp", tmp_path, "sequential", 3, "local", evaluate=NO_EVALUATION)
    result = json.loads((run(config) / "result.json").read_text())
    (width,) = draw_up(config, describe(config)).output_shape(0)
    #  50 images, of the phase of stage 1 and of that of stage 2
    assert [stage["bytes_sent"] for stage in result["stages"]] == [2 * 50 * width * 4, 50 * width * 4, 0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A finished serial run with or without a cache, with every checkpoint of 3 steps kept."""
    done: dict[tuple[str, str], Path] = {}

    def get(cache: str, order: str) -> Path:
        if (cache, order) not in done:
            done[cache, order] = run(resumable(cache, order, tmp_path_factory.mktemp("finished"), "serial"))
        return done[cache, order]

    return get


def resumable(cache: str, order: str, folder: Path, launcher: str) -> Config:
    return cached(cache, "resnet", folder, order, 2, launcher, checkpoint={"every": 3, "keep": 99, "resume": "auto"})


# Stage 1 learns in steps 14 to 34, whose epochs begin with 14, 21 and 28; in the second lap in steps 49 to 69.
@pytest.mark.parametrize(
    ("order", "step"),
    [("sequential", step) for step in (12, 15, 18, 21, 24, 30, 33)] + [("multi_lap", step) for step in (36, 54, 60)],
)
def test_resuming_within_a_phase_fills_the_cache_anew_and_equals_never_stopping(
    finished: Callable[[str, str], Path], tmp_path: Path, order: str, step: int
) -> None:
    original = finished("memory", order)
    folder = tmp_path / original.name
    shutil.copytree(original, folder)
    (folder / "result.json").unlink()
    for later in (folder / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    assert run(resumable("memory", order, tmp_path, "threads")) == folder
    assert json.loads((folder / "result.json").read_text())["first_step"] == step
    assert_equal_runs(folder, original)
    assert_equal_runs(folder, finished("none", order))
