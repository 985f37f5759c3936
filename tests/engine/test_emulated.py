"""Emulated devices: exact times on a clock that only they move, the same stream, and no number that nobody computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.schema import Config
from pipetrgl.engine import loop
from pipetrgl.engine.emulated import Device, EmulatedStage, Times
from pipetrgl.engine.phases import Parallel
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch
from pipetrgl.seeds import NUM_DRAWS, jitter_draws
from pipetrgl.stage import StageOutput
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import metrics, run, tiny

SECONDS = {"forward_s": 1.0, "backward_s": 2.0, "update_s": 4.0}
QUICK = {"forward_s": 0.0005, "backward_s": 0.001}


class Clock:
    """A clock that stands still but for sleeps, each of which ends `late_s` late."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s

    def device(self) -> Device:
        return Device(self, self.sleep)


def emulated(folder: Path, times: dict[str, Any], stages: int = 2, **sections: Any) -> Config:
    pipeline = {"stages": stages, "device": "emulated", "emulated": times}
    return tiny("mlp", folder, pipeline=pipeline, **sections)


def drawn_up(config: Config) -> Blueprint:
    return draw_up(config, describe(config))


def stage_of(blueprint: Blueprint, index: int, device: Device) -> EmulatedStage:
    stage, times = build_stage(blueprint, index, torch.device("cpu")), Times(blueprint.config, index)
    shape = blueprint.output_shape(index)
    return EmulatedStage(stage, shape, blueprint.logits_shape, blueprint.max_rows, times, device)


class Seen:
    """An inbox of micro-batches, an outbox and a hook that note what they see, and when."""

    waited_s = 0.0
    sent_bytes = 0
    received_index = -1

    def __init__(self, batches: list[MicroBatch], clock: Clock) -> None:
        self._batches = batches
        self._clock = clock
        self.sent: list[tuple[float, MicroBatch]] = []
        self.done: list[float] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def send(self, micro_batch: MicroBatch) -> None:
        self.sent.append((self._clock.now - 100.0, micro_batch))

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self.done.append(self._clock.now - 100.0)

    def close(self) -> None:
        pass


def stream(config: Config, folder: Path) -> list[MicroBatch]:
    with build_loader(Job(drawn_up(config), folder, {})) as loader:
        return list(loader)


def pass_by(config: Config, folder: Path) -> Seen:
    """Stage 0 on its whole stream, on a clock without any lateness."""
    clock = Clock()
    seen = Seen(stream(config, folder), clock)
    loop.run(stage_of(drawn_up(config), 0, clock.device()), seen, seen, Parallel(), [seen])
    return seen


def test_a_computation_is_as_much_shorter_as_the_one_before_was_late() -> None:
    #  time     0   1   2   3            every sleep ends 0.25 late, and only once in all
    #  device   ────▒───▒───▒
    clock = Clock(late_s=0.25)
    device, ends = clock.device(), []
    for _ in range(3):
        device.take(1.0)
        ends.append(clock.now - 100.0)
    assert ends == [1.25, 2.25, 3.25]


def test_an_update_that_takes_no_time_changes_nothing_of_that() -> None:
    clock = Clock(late_s=0.25)
    device, ends = clock.device(), []
    for _ in range(3):
        device.take(1.0)
        device.take(0.0)
        ends.append(clock.now - 100.0)
    assert ends == [1.25, 2.25, 3.25]


def test_what_the_engine_does_between_two_computations_counts_in_full() -> None:
    clock = Clock(late_s=0.25)
    device, ends = clock.device(), []
    for _ in range(3):
        device.take(1.0)
        ends.append(clock.now - 100.0)
        clock.now += 0.5
    assert ends == [1.25, 2.75, 4.25]


def test_a_delay_longer_than_the_next_computation_is_not_made_up_for() -> None:
    clock = Clock(late_s=3.0)
    device = clock.device()
    device.take(1.0)
    clock.late_s = 0.0
    device.take(1.0)  # the worker was stopped: this one is over at once, and that is all
    device.take(1.0)
    assert clock.now - 100.0 == 1.0 + 3.0 + 0.0 + 1.0


def test_an_activation_leaves_after_the_forward_and_before_the_backward_pass(tmp_path: Path) -> None:
    #  time     0 1 2 3 4 5 6 7 8 9       micro-batches of 8 rows, two of them a step
    #  stage 0  f b b f b b u u u u       sent at 1 and 4
    train = {"max_steps": 1, "batch": 16, "accumulate": 2}
    config = emulated(
        tmp_path, SECONDS, train=train, evaluate={"valid_every": 0, "at_start": False, "test_at_end": False}
    )
    seen = pass_by(config, tmp_path)
    assert [when for when, _ in seen.sent] == [1.0, 4.0]
    assert seen.done == [3.0, 10.0]


def test_times_grow_with_the_rows_and_an_evaluation_takes_only_forward_passes(tmp_path: Path) -> None:
    #  7 rows of validation, then a step of 8 rows: 7/8, then 1 + 2 + 4, then 3 validations and the test
    config = emulated(tmp_path, SECONDS, train={"max_steps": 1}, evaluate={"batch": 7, "at_start": True})
    seen = pass_by(config, tmp_path)
    assert seen.done[:2] == [7 / 8, 14 / 8]
    rows = [batch.num_rows for _, batch in seen.sent]
    assert seen.done[-1] == pytest.approx(sum(rows) / 8 + 2 + 4)  # sums of eighths in another order


def test_the_rows_that_times_are_for_and_a_list_of_stages(tmp_path: Path) -> None:
    config = emulated(tmp_path, {"forward_s": [1.0, 3.0], "backward_s": 2.0, "rows": 4})
    times = Times(config, 1)
    assert (times.forward_s * 8, times.backward_s * 8, times.update_s) == (6.0, 4.0, 0.0)


def test_jitter_is_a_function_of_seed_stage_and_place_and_the_simulator_has_the_same(tmp_path: Path) -> None:
    times = Times(emulated(tmp_path, {**SECONDS, "jitter": 0.5}), 1)
    places = [2 * NUM_DRAWS + 3, 5, 0]
    draws = [jitter_draws(0, 1, place // NUM_DRAWS)[place % NUM_DRAWS] for place in places]
    assert [times.drawn(place) for place in places] == [1 + 0.5 * draw for draw in draws]
    assert len(set(draws)) == 3
    assert all(-1 <= draw < 1 for draw in draws)


def test_an_emulated_stage_hands_on_the_micro_batches_of_a_real_one(tmp_path: Path) -> None:
    config = emulated(tmp_path, QUICK)
    real, clock = tiny("mlp", tmp_path, pipeline={"stages": 2}), Clock()
    theirs = Seen(stream(real, tmp_path), clock)
    loop.run(build_stage(drawn_up(real), 0, torch.device("cpu")), theirs, theirs, Parallel(), [])
    ours = pass_by(config, tmp_path)
    assert len(ours.sent) == len(theirs.sent) == drawn_up(config).itinerary.num_stops
    for (_, mine), (_, other) in zip(ours.sent, theirs.sent, strict=True):
        assert isinstance(mine.activation, torch.Tensor)
        assert isinstance(other.activation, torch.Tensor)
        assert (mine.activation.shape, mine.activation.dtype) == (other.activation.shape, other.activation.dtype)
        assert mine.target.equal(other.target)
        assert mine.positions.equal(other.positions)
        names = ("split", "epoch", "step", "index", "row_start", "batch_rows", "closes_step", "closes_split")
        assert [getattr(mine, name) for name in names] == [getattr(other, name) for name in names]


def test_what_is_on_its_way_is_never_written_to(tmp_path: Path) -> None:
    sent = [batch.activation for _, batch in pass_by(emulated(tmp_path, QUICK), tmp_path).sent]
    assert {tensor._version for tensor in sent if isinstance(tensor, torch.Tensor)} == {0}


@pytest.fixture(scope="module")
def by_launcher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same emulated pipeline of three stages, in processes, in threads and in the plain loop."""
    folders = {}
    for name in ("local", "threads", "serial"):
        folder = tmp_path_factory.mktemp(name)
        folders[name] = run(emulated(folder, QUICK, stages=3, launcher={"name": name}))
    return folders


def test_every_launcher_runs_emulated_stages_and_writes_the_same_rows(by_launcher: dict[str, Path]) -> None:
    rows = {name: metrics(folder) for name, folder in by_launcher.items()}
    assert rows["local"] == rows["threads"] == rows["serial"]
    assert {row["step"] for row in rows["local"].values() if row["kind"] == "train"} == {5, 10, 15, 20, 25, 30}


def test_no_number_is_written_that_nobody_computed_and_nothing_is_saved(by_launcher: dict[str, Path]) -> None:
    learned = ("local_loss", "task_loss", "transport_cost", "accuracy")
    for row in metrics(by_launcher["local"]).values():
        assert {row[name] for name in learned if name in row} == {None}
    result = json.loads((by_launcher["local"] / "result.json").read_text())
    assert (result["status"], result["device"], result["num_steps"]) == ("done", "emulated", 30)
    assert result["best_head"] is None
    assert all(stage["images_per_s"] > 0 and stage["cpu_s"] > 0 for stage in result["stages"])
    assert not (by_launcher["local"] / "checkpoints").exists()
    assert "no loss of its own" in (by_launcher["local"] / "logs" / "stage-0.log").read_text()
