"""The plan of the stream, counted by hand."""

import pytest

from pipetrgl.config.schema import EvaluateConfig, TrainConfig
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.errors import DataError


def spec(num_train: int = 10, num_valid: int = 3, num_test: int = 5) -> DataSpec:
    return DataSpec("synthetic", num_train, num_valid, num_test, (1, 1, 1), 2)


def itinerary(
    train: dict[str, object], evaluate: dict[str, object] | None = None, num_stages: int = 1, **counts: int
) -> Itinerary:
    evaluation = EvaluateConfig(**{"batch": 2, **(evaluate or {})})
    return Itinerary(TrainConfig(**train), evaluation, spec(**counts), num_stages)


def drawing(plan: Itinerary, first_step: int = 0) -> str:
    """A word for each micro-batch: t, v or e (test), its step, its rows; `|` behind one that closes its split."""
    letter = {"train": "t", "valid": "v", "test": "e"}
    return " ".join(
        f"{letter[stop.split.label]}{stop.step}:{stop.num_rows}{'|' if stop.closes_split else ''}"
        for stop in plan.stops(first_step)
    )


def test_one_epoch_then_validation_then_test() -> None:
    plan = itinerary({"epochs": 1, "batch": 4})
    assert drawing(plan) == "t0:4 t1:4 t2:2| v3:2 v3:1| e3:2 e3:2 e3:1|"
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_stops) == (3, 3, 8)


def test_validation_twice_an_epoch() -> None:
    plan = itinerary({"epochs": 2, "batch": 5}, {"valid_every": 0.5, "test_at_end": False}, num_valid=2)
    assert drawing(plan) == "t0:5 v1:2| t1:5| v2:2| t2:5 v3:2| t3:5| v4:2|"


def test_validation_every_second_epoch_and_after_the_last_step() -> None:
    plan = itinerary({"epochs": 3, "batch": 10}, {"valid_every": 2.0, "test_at_end": False}, num_valid=2)
    assert drawing(plan) == "t0:10| t1:10| v2:2| t2:10| v3:2|"


def test_validation_more_often_than_steps_comes_after_every_step() -> None:
    plan = itinerary({"epochs": 1, "batch": 5}, {"valid_every": 0.01, "test_at_end": False}, num_valid=1)
    assert drawing(plan) == "t0:5 v1:1| t1:5| v2:1|"


def test_at_start_validates_before_the_first_step() -> None:
    plan = itinerary({"epochs": 1, "batch": 10}, {"at_start": True, "test_at_end": False}, num_valid=2)
    assert drawing(plan) == "v0:2| t0:10| v1:2|"


def test_empty_splits_are_not_evaluated() -> None:
    plan = itinerary({"epochs": 1, "batch": 10}, {"at_start": True}, num_valid=0, num_test=0)
    assert drawing(plan) == "t0:10|"


def test_validation_switched_off_leaves_the_test() -> None:
    assert drawing(itinerary({"epochs": 1, "batch": 10}, {"valid_every": 0.0}, num_test=1)) == "t0:10| e1:1|"


def test_max_steps_ends_within_an_epoch_and_closes_it() -> None:
    plan = itinerary({"epochs": 2, "batch": 4, "max_steps": 4}, {"test_at_end": False}, num_valid=1)
    assert drawing(plan) == "t0:4 t1:4 t2:2| v3:1| t3:4| v4:1|"


def test_drop_last_leaves_out_the_smaller_batch() -> None:
    plan = itinerary({"epochs": 1, "batch": 4, "drop_last": True}, {"valid_every": 0.0}, num_test=0)
    assert drawing(plan) == "t0:4 t1:4|"


def test_a_rest_of_one_row_is_left_out() -> None:
    plan = itinerary({"epochs": 1, "batch": 3}, {"valid_every": 0.0}, num_test=0)
    assert drawing(plan) == "t0:3 t1:3 t2:3|"


def test_accumulation_parts_a_step_as_evenly_as_it_can() -> None:
    plan = itinerary({"epochs": 1, "batch": 7, "accumulate": 3}, {"valid_every": 0.0}, num_test=0)
    # The rest of 3 rows makes one micro-batch: two would leave one of a single row.
    assert drawing(plan) == "t0:3 t0:2 t0:2 t1:3|"
    rows = [(stop.first_row, stop.end_row, stop.row_start, stop.batch_rows, stop.closes_step) for stop in plan.stops()]
    assert rows == [(0, 3, 0, 7, False), (3, 5, 3, 7, False), (5, 7, 5, 7, True), (7, 10, 0, 3, True)]


def test_the_last_micro_batch_of_a_phase_closes_it() -> None:
    def closing(train: dict[str, object], **options: object) -> list[int]:
        plan = itinerary({"batch": 5, "accumulate": 2, **train}, num_valid=1, num_test=0, **options)
        stops = list(plan.stops())
        assert all(stop.closes_step for stop in stops if stop.closes_phase)
        return [stop.step for stop in stops if stop.closes_phase]

    # two steps an epoch; stage 0 learns for one epoch, stage 1 for two
    assert closing({"epochs": 3}, num_stages=2) == [5]
    assert closing({"epochs": 1, "epochs_growth": 1, "order": "sequential"}, num_stages=2) == [1, 5]
    assert closing({"epochs": 1, "order": "multi_lap", "laps": 2, "max_steps": 7}, num_stages=2) == [1, 3, 5, 6]


def test_epochs_count_on_through_phases_and_laps() -> None:
    plan = itinerary({"epochs": 1, "batch": 5, "order": "multi_lap", "laps": 2}, {"valid_every": 0.0}, num_stages=2)
    assert [stop.epoch for stop in plan.stops() if stop.split.label == "train"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (plan.total_steps, plan.steps_per_epoch) == (8, 2)


def test_an_evaluation_carries_the_steps_taken_and_the_epoch_just_trained() -> None:
    plan = itinerary({"epochs": 2, "batch": 5}, {"at_start": True})
    evaluations = [stop for stop in plan.stops() if stop.split.label != "train"]
    assert {(stop.split.label, stop.step, stop.epoch) for stop in evaluations} == {
        ("valid", 0, 0),
        ("valid", 2, 0),
        ("valid", 4, 1),
        ("test", 4, 1),
    }
    assert not any(stop.closes_step for stop in evaluations)
    assert [(stop.row_start, stop.num_rows, stop.batch_rows) for stop in evaluations[:2]] == [(0, 2, 3), (2, 1, 3)]


@pytest.mark.parametrize("valid_every", [0.0, 0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("first_step", [0, 1, 2, 5, 9, 11])
def test_stops_from_a_step_are_the_tail_of_the_whole_run(valid_every: float, first_step: int) -> None:
    plan = itinerary(
        {"epochs": 4, "batch": 4, "accumulate": 2, "max_steps": 11}, {"valid_every": valid_every, "at_start": True}
    )
    whole = list(plan.stops())
    tail = list(plan.stops(first_step))

    # An evaluation carries the steps taken before it; the one that follows step first_step - 1 is done again.
    assert tail == [stop for stop in whole if stop.step >= first_step]
    assert [stop.index for stop in whole] == list(range(plan.num_stops))


def test_too_few_images_for_one_step_is_an_error() -> None:
    with pytest.raises(DataError, match="10 images, too few for one step of 16 rows with train.drop_last"):
        itinerary({"batch": 16, "drop_last": True})
