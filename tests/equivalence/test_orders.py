"""The sequential and multi-lap orders: every launcher and every resume equals plain nested loops, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipetrgl import optim
from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config
from pipetrgl.data import catalogue
from pipetrgl.data.augment import crop_and_flip, normalise
from pipetrgl.data.order import epoch_draws, epoch_order
from pipetrgl.engine.checkpoint import newest_complete
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.worker import build_stage, configure_torch
from tests.equivalence.runs import assert_equal_runs, metrics, run, tiny, weights
from tests.equivalence.test_resume import break_once, without_logs

STEPS_PER_EPOCH = 7  # 50 training images in batches of 8, the last one of 2
Tensors = dict[str, Tensor]


def ordered(model: str, folder: Path, order: str, stages: int, launcher: str = "serial", /, **sections: Any) -> Config:
    """A tiny run of 1, 2, .. epochs by stage, without accumulation; two laps if multi-lap."""
    train: dict[str, Any] = {"order": order, "epochs": 1, "epochs_growth": 1, "max_steps": None, "accumulate": 1}
    if order == "multi_lap":
        train["laps"] = 2
    sections["train"] = {**train, **sections.get("train", {})}
    sections = {"data": {"samples": 56}, **sections, "launcher": {"name": launcher, **sections.get("launcher", {})}}
    return tiny(model, folder, pipeline={"stages": stages}, **sections)


def plain(config: Config) -> Tensors:
    """The algorithm as nested loops, without plan, itinerary, channels or hooks: all weights and buffers at the end."""
    configure_torch(config.train)
    blueprint = draw_up(config, describe(config))
    stages = [build_stage(blueprint, index, torch.device("cpu")) for index in range(config.pipeline.stages)]
    data, train, seed = catalogue.load(config.data, config.seed, {}), config.train, config.seed
    padding, flip, total = config.data.crop_padding, config.data.flip, len(data.train)
    step = epoch = 0
    for lap in range(train.laps):
        for k, learner in enumerate(stages):
            epochs = train.epochs + k * train.epochs_growth
            own_total = train.laps * epochs * STEPS_PER_EPOCH
            for own_epoch in range(epochs):
                order, draws = epoch_order(seed, epoch, total), epoch_draws(seed, epoch, total, padding, flip)
                for number, start in enumerate(range(0, total, train.batch)):
                    rows = order[start : start + train.batch]
                    images = crop_and_flip(data.train.read(rows), draws.at(rows), padding)
                    z = torch.from_numpy(normalise(images, data.spec.mean, data.spec.std))
                    labels, places = torch.from_numpy(data.train.labels[rows]), torch.from_numpy(rows.copy())
                    batch = MicroBatch(
                        z, labels, places, Split.TRAIN, epoch, step, step, 0, len(rows), closes_step=True,
                        closes_split=False,
                    )  # fmt: skip
                    for frozen in stages[:k]:
                        batch = batch.carrying(frozen.forward(batch, train=False).activation)
                    learner.backward(learner.forward(batch, train=True), batch)
                    own_step = (lap * epochs + own_epoch) * STEPS_PER_EPOCH + number
                    rate = optim.learning_rate(config.optim, own_step, STEPS_PER_EPOCH, own_total)
                    assert learner.learning_rate == rate
                    learner.update()
                    step += 1
                epoch += 1
    return {name: tensor for stage in stages for name, tensor in stage.state().items()}


def assert_equal(folder: Path, reference: Tensors) -> None:
    """Bit-equal weights and buffers; a checkpoint also holds optimizer and metrics."""
    got = weights(folder)
    assert reference.keys() <= got.keys()
    assert [name for name in reference if not got[name].equal(reference[name])] == []


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("model", ["resnet", "vit"])
@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_nested_loops_equal_serial_equal_threads(tmp_path: Path, order: str, model: str, stages: int) -> None:
    serial = run(ordered(model, tmp_path / "serial", order, stages))
    threads = run(ordered(model, tmp_path / "threads", order, stages, "threads", channel={"capacity": 2}))
    assert_equal(serial, plain(ordered(model, tmp_path, order, stages)))
    assert_equal_runs(threads, serial)


@pytest.mark.parametrize(("order", "codec"), [("sequential", "fp32"), ("multi_lap", "int8")])
def test_local_processes_equal_serial(tmp_path: Path, order: str, codec: str) -> None:
    options = {"channel": {"codec": codec}}
    local = run(ordered("mlp", tmp_path / "local", order, 3, "local", **options))
    serial = run(ordered("mlp", tmp_path / "serial", order, 3, **options))
    assert_equal_runs(local, serial)


def test_multipliers_count_a_stages_own_updates(tmp_path: Path) -> None:
    options = {"objective": {"transport": {"multipliers": {"enabled": True, "every": 4}}}}
    serial = run(ordered("resnet", tmp_path / "serial", "multi_lap", 2, **options))
    assert_equal(serial, plain(ordered("resnet", tmp_path, "multi_lap", 2, **options)))
    assert_equal_runs(run(ordered("resnet", tmp_path / "threads", "multi_lap", 2, "threads", **options)), serial)


def test_a_single_stage_one_by_one_is_the_parallel_order(tmp_path: Path) -> None:
    sequential = run(ordered("mlp", tmp_path / "a", "sequential", 1))
    train = {"epochs": 1, "max_steps": None}
    parallel = run(tiny("mlp", tmp_path / "b", train=train, data={"samples": 56}, pipeline={"stages": 1},
                        launcher={"name": "serial"}))  # fmt: skip
    assert_equal_runs(sequential, parallel)


@pytest.mark.parametrize("launcher", ["threads", "local"])
def test_no_byte_is_sent_to_an_idle_stage(tmp_path: Path, launcher: str) -> None:
    #            phase 0      phase 1      cut before phase 2
    #  stage 0   learns ─ ticks ─▶   hands on ──▶
    #  stage 1   idle         learns    ─ ticks ─▶
    #  stage 2   idle         idle
    cut = {"epochs_growth": 0, "max_steps": STEPS_PER_EPOCH + 3}
    options = {"train": cut, "evaluate": {"valid_every": 0.0, "at_start": False, "test_at_end": False}}
    config = ordered("mlp", tmp_path, "sequential", 3, launcher, **options)
    result = json.loads((run(config) / "result.json").read_text())
    blueprint = draw_up(config, describe(config))
    (width,) = blueprint.output_shape(0)
    assert [stage["bytes_sent"] for stage in result["stages"]] == [3 * 8 * width * 4, 0, 0]
    assert [stage["num_steps"] for stage in result["stages"]] == [STEPS_PER_EPOCH, 3, 0]
    assert (result["num_steps"], result["total_steps"]) == (STEPS_PER_EPOCH + 3, STEPS_PER_EPOCH + 3)
    assert [stage["valid_accuracy"] for stage in result["stages"]] == [None, None, None]


def test_each_stage_writes_train_rows_in_its_own_phase_only_and_one_when_it_closes(tmp_path: Path) -> None:
    folder = run(ordered("mlp", tmp_path, "sequential", 3))
    steps: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for kind, stage, step in metrics(folder):
        if kind == "train":
            steps[stage].append(step)
    #  phases end after 7, 21 and 42 steps; a row every 5
    assert steps == {0: [5, 7], 1: [10, 15, 20, 21], 2: [25, 30, 35, 40, 42]}
    valid = {(step, stage) for kind, stage, step in metrics(folder) if kind == "valid"}
    assert {stage for step, stage in valid if step <= 7} == {0}
    assert {stage for step, stage in valid if 7 < step <= 21} == {0, 1}
    assert {stage for step, stage in valid if step > 21} == {0, 1, 2}
    assert {stage for kind, stage, _ in metrics(folder) if kind == "test"} == {0, 1, 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished serial run of an order, with every checkpoint of 7 steps kept."""
    done: dict[str, Path] = {}

    def get(order: str) -> Path:
        if order not in done:
            done[order] = run(resumable(order, tmp_path_factory.mktemp(order), "serial"))
        return done[order]

    return get


def resumable(order: str, folder: Path, launcher: str) -> Config:
    options = {"checkpoint": {"every": STEPS_PER_EPOCH, "keep": 99, "resume": "auto"}}
    return ordered("resnet", folder, order, 3 if order == "sequential" else 2, launcher, **options)


# The phases end after 7, 21, 42 steps (sequential) and 7, 21, 28, 42 (multi-lap): at a border and within each phase,
# there with metrics rows of 5 steps half done; 42 leaves the last evaluations only.
@pytest.mark.parametrize("step", [7, 14, 21, 28, 35, 42])
@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_resuming_from_any_phase_and_border_equals_never_stopping(
    finished: Callable[[str], Path], tmp_path: Path, order: str, step: int
) -> None:
    folder = tmp_path / finished(order).name
    shutil.copytree(finished(order), folder)
    (folder / "result.json").unlink()
    for later in (folder / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    assert run(resumable(order, tmp_path, "threads")) == folder
    assert_equal_runs(folder, finished(order))
    result = json.loads((folder / "result.json").read_text())
    original = json.loads((finished(order) / "result.json").read_text())
    assert result["first_step"] == step
    assert [stage["num_steps"] for stage in result["stages"]] == [stage["num_steps"] for stage in original["stages"]]


@pytest.mark.parametrize(("stage", "update"), [(0, 5), (1, 0), (1, 9), (2, 20)])
def test_a_stage_that_fails_in_any_phase_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, update: int
) -> None:
    options = {"checkpoint": {"every": 3}}
    undisturbed = run(ordered("resnet", tmp_path / "a", "sequential", 3, **options))
    break_once(monkeypatch, stage, update)
    again = {"launcher": {"max_failures": 1}}
    disturbed = run(ordered("resnet", tmp_path / "b", "sequential", 3, "threads", **options, **again))
    assert '"kind": "log"' in (disturbed / "metrics.jsonl").read_text()
    assert_equal_runs(without_logs(disturbed), undisturbed)


@pytest.mark.parametrize(
    ("order", "stages", "train"),
    [("sequential", 2, {"epochs": 9}), ("sequential", 3, {"epochs": 9}), ("multi_lap", 3, {"epochs_growth": 3})],
)
def test_a_checkpoint_of_other_stages_or_epochs_is_refused(
    finished: Callable[[str], Path], tmp_path: Path, order: str, stages: int, train: dict[str, Any]
) -> None:
    options = {"train": train, "checkpoint": {"resume": str(finished("sequential"))}}
    message = r"holds step 42 of a run whose stages have taken 7 \(from .*\), 14 \(from .*\), 21 \(from .*\), but here"
    with pytest.raises(ConfigError, match=message):
        run(ordered("resnet", tmp_path, order, stages, **options))


def test_a_checkpoint_of_one_order_is_refused_by_the_other(finished: Callable[[str], Path], tmp_path: Path) -> None:
    train = {"epochs": 9, "max_steps": None}
    options: dict[str, Any] = {"data": {"samples": 56}, "train": train, "launcher": {"name": "serial"}}
    with pytest.raises(ConfigError, match="but here that would be a step of a parallel run"):
        resume = {"resume": str(finished("sequential"))}
        run(tiny("resnet", tmp_path / "a", pipeline={"stages": 3}, checkpoint=resume, **options))
    parallel = run(tiny("resnet", tmp_path / "b", pipeline={"stages": 3}, **{**options, "train": {"max_steps": 9}}))
    with pytest.raises(ConfigError, match="holds step 9 of a parallel run, but here"):
        run(ordered("resnet", tmp_path / "c", "sequential", 3, checkpoint={"resume": str(parallel)}))


def test_a_finished_multi_lap_run_goes_on_with_another_lap(tmp_path: Path) -> None:
    constant = {"optim": {"schedule": {"name": "constant"}}}
    three = run(ordered("mlp", tmp_path / "three", "multi_lap", 2, **constant, train={"laps": 3}))
    two = run(ordered("mlp", tmp_path / "two", "multi_lap", 2, **constant))
    further = {"checkpoint": {"resume": str(two)}, "train": {"laps": 3}}
    assert_equal(run(ordered("mlp", tmp_path / "further", "multi_lap", 2, **constant, **further)), weights(three))


def test_a_manifest_of_an_earlier_version_is_a_parallel_one(tmp_path: Path) -> None:
    folder = run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"name": "serial"}))
    path = folder / "checkpoints" / "step-30" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("updates") == {}
    path.write_text(json.dumps(manifest))
    found = newest_complete(folder)
    assert found is not None
    assert found.updates == {}
