"""What each stage does with each micro-batch, and what an idle one gets."""

from __future__ import annotations

import pytest
import torch

from pipetrgl.config.schema import EvaluateConfig, TrainConfig
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.seen import SeenInPhase
from pipetrgl.engine.idle import NOTHING, IdlingStage, ticking
from pipetrgl.engine.phases import Plan, Recalling, Role, plan_of
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput

LETTER = {Role.TRAIN: "#", Role.PASS: "-", Role.IDLE: "."}


def batches(train: dict[str, object], num_stages: int) -> tuple[list[MicroBatch], Plan]:
    """A stream of one optimizer step an epoch, one row in each evaluation, validation after every epoch."""
    config = TrainConfig(batch=2, **train)
    spec = DataSpec("synthetic", 2, 1, 1, (1, 1, 1), 2)
    itinerary = Itinerary(config, EvaluateConfig(at_start=True), spec, num_stages)
    stream = [
        MicroBatch(
            torch.ones(stop.num_rows, 1), torch.zeros(stop.num_rows, dtype=torch.int64), torch.arange(stop.num_rows),
            stop.split, stop.epoch, stop.step, stop.index, stop.row_start, stop.batch_rows, stop.closes_step,
            stop.closes_split, stop.closes_phase,
        )
        for stop in itinerary.stops()
    ]  # fmt: skip
    plan = plan_of(config.order, itinerary.sweep)
    return stream, plan if config.cache == "none" else Recalling(plan, SeenInPhase(itinerary, 0, spec.num_train, 0))


def drawing(train: dict[str, object], num_stages: int) -> list[str]:
    """The stream's splits, then a row a stage: `#` learns, `-` hands on, `.` idle."""
    stream, plan = batches(train, num_stages)
    splits = "".join({"train": "t", "valid": "v", "test": "e"}[batch.split.label] for batch in stream)
    rows = ["".join(LETTER[plan.role(stage, batch)] for batch in stream) for stage in range(num_stages)]
    return [splits, *rows]


def test_in_the_parallel_order_no_stage_is_ever_idle() -> None:
    assert drawing({"epochs": 2}, 2) == [
        "vtvtve",
        "-#-#--",
        "-#-#--",
    ]


def test_in_the_sequential_order_the_stages_behind_the_learner_are_idle_and_the_test_reaches_all() -> None:
    assert drawing({"order": "sequential", "epochs": 1, "epochs_growth": 1}, 3) == [
        "vtvtvtvtvtvtve",
        "-#------------",
        "...#-#--------",
        ".......#-#-#--",
    ]


def test_from_the_second_lap_on_every_evaluation_reaches_all_stages() -> None:
    assert drawing({"order": "multi_lap", "epochs": 1, "laps": 2}, 2) == [
        "vtvtvtvtve",
        "-#---#----",
        "...#-.-#--",
    ]


def test_a_run_cut_short_evaluates_no_stage_that_has_never_learned() -> None:
    assert drawing({"order": "sequential", "epochs": 1, "max_steps": 2}, 3) == [
        "vtvtve",
        "-#----",
        "...#--",
        "......",
    ]


def test_with_a_cache_the_stages_before_the_learner_hand_on_in_its_first_epoch_and_in_evaluations() -> None:
    assert drawing({"order": "sequential", "epochs": 2, "cache": "memory"}, 3) == [
        "vtvtvtvtvtvtve",
        "-#-#---.---.--",
        ".....#-#---.--",
        ".........#-#--",
    ]


@pytest.mark.parametrize(
    "train", [{"order": "sequential", "epochs": 1}, {"order": "multi_lap", "laps": 3, "epochs": 1}]
)
def test_behind_an_idle_stage_all_are_idle_and_the_first_never_is(train: dict[str, object]) -> None:
    stream, plan = batches(train, 4)
    for batch in stream:
        roles = [plan.role(stage, batch) for stage in range(4)]
        idle = [role is Role.IDLE for role in roles]
        assert idle == sorted(idle)
        assert not idle[0]
        assert roles.count(Role.TRAIN) == (batch.split.label == "train")


def test_with_a_cache_a_stage_is_handed_nothing_that_it_recalls() -> None:
    stream, plan = batches({"order": "sequential", "epochs": 2, "cache": "memory"}, 3)
    handed = ["".join(".#"[plan.feeds(stage, batch)] for batch in stream) for stage in range(3)]
    assert handed == [
        "#######.###.##",
        ".....##.###.##",
        ".........##.##",
    ]


class Sent:
    waited_s = 0.0
    sent_bytes = 0

    def __init__(self) -> None:
        self.ticks: list[bool] = []

    def send(self, micro_batch: MicroBatch) -> None:
        self.ticks.append(micro_batch.is_tick)

    def close(self) -> None:
        pass


class Never:
    """A stage that fails when it is asked to compute."""

    index = 1

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        raise AssertionError("an idle stage computes nothing")

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        raise AssertionError

    def update(self) -> None:
        raise AssertionError


def test_an_idle_receiver_gets_ticks_that_keep_targets_and_place() -> None:
    stream, plan = batches({"order": "sequential", "epochs": 1}, 2)
    sent = Sent()
    outbox = ticking(sent, plan, stage=1)
    for batch in stream:
        outbox.send(batch)
    #   v t | v t v e      stage 1 learns in the second step
    assert sent.ticks == [True, True, True, False, False, False]
    tick = stream[1].carrying(())
    assert tick.is_tick
    assert (tick.step, tick.num_rows, tick.closes_phase) == (0, 2, True)


def test_an_idle_stage_makes_nothing_of_a_tick_and_refuses_one_at_another_time() -> None:
    stream, plan = batches({"order": "sequential", "epochs": 1}, 2)
    stage = IdlingStage(Never(), plan)
    output = stage.forward(stream[1].carrying(()), train=False)
    assert output is NOTHING
    assert not output.trained
    with pytest.raises(AssertionError):
        stage.forward(stream[3].carrying(()), train=True)  # the step in which it learns
