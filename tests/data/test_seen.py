"""Which micro-batches a learning stage has seen before, counted by hand on orders that are written out."""

from __future__ import annotations

import numpy as np
import pytest

from pipetrgl.config.schema import EvaluateConfig, TrainConfig
from pipetrgl.data import seen
from pipetrgl.data.dataset import DataSpec
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.order import epoch_order
from pipetrgl.data.seen import NothingSeen, SeenInPhase
from pipetrgl.microbatch import Split

FOUR = ["0123", "3210", "1302", "2031", "0213", "3120"]


def drawn(
    monkeypatch: pytest.MonkeyPatch, orders: list[str], first_step: int = 0, num_stages: int = 2, **train: object
) -> str:
    """A letter a micro-batch from `first_step` on, a space between epochs: `#` handed on by all stages, `.` seen."""
    monkeypatch.setattr(seen, "epoch_order", lambda seed, epoch, num: np.array([int(n) for n in orders[epoch]]))
    spec = DataSpec("synthetic", len(orders[0]), 0, 0, (1, 1, 1), 2)
    config = TrainConfig.model_validate({"order": "sequential", "batch": 2, "cache": "memory", **train})
    itinerary = Itinerary(config, EvaluateConfig(), spec, num_stages)
    known = SeenInPhase(itinerary, 0, spec.num_train, first_step)
    text = ""
    for stop in itinerary.stops(first_step):
        if stop.split is Split.TRAIN:
            rows = orders[stop.epoch][stop.first_row : stop.end_row]
            text += ".#"[not known.all(stop.step, np.array([int(n) for n in rows]))] + " " * stop.closes_split
    return text.strip()


def test_all_is_seen_after_the_first_epoch_of_a_phase_but_stage_0_is_always_handed_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    #                                        stage 0  stage 1
    assert drawn(monkeypatch, FOUR, epochs=3) == "## ## ## ## .. .."


def test_each_phase_and_each_lap_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = drawn(monkeypatch, FOUR, epochs=1, epochs_growth=1, num_stages=3)
    #                 stage 0, 1 twice, 2 three times
    assert growing == "## ## .. ## .. .."
    laps = drawn(monkeypatch, FOUR, order="multi_lap", laps=2, epochs=1, epochs_growth=1)
    assert laps == "## ## .. ## ## .."


@pytest.mark.parametrize("drop_last", [False, True])  # a rest of one row is left out in any case
def test_what_an_epoch_leaves_out_is_seen_when_it_first_comes(monkeypatch: pytest.MonkeyPatch, drop_last: bool) -> None:
    #  stage 1 learns in the last three: 1 is left out of the first of them, and comes in the second
    orders = ["012", "012", "012", "201", "012", "120"]
    assert drawn(monkeypatch, orders, epochs=3, drop_last=drop_last) == "# # # # # ."


def test_what_is_left_out_twice_comes_later_still(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = ["01234", "01234", "01234", "01234", "01234", "10324", "24013", "40213"]
    #  stage 1 learns in the last four; 4 is left out of two of them, then only its own batch is new
    assert drawn(monkeypatch, orders, epochs=4) == "## ## ## ## ## .. #. .."


def test_micro_batches_of_one_step_are_judged_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = ["01234567"] * 3 + ["70123456"]
    assert drawn(monkeypatch, orders, epochs=2, batch=4, accumulate=2) == "#### #### #### ...."
    assert drawn(monkeypatch, orders, 7, epochs=2, batch=4, accumulate=2) == "##"


def test_after_a_resume_within_a_phase_nothing_before_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, FOUR, 6, epochs=3) == "## .. .."  # with the phase of stage 1
    assert drawn(monkeypatch, FOUR, 8, epochs=3) == "## .."  # with its second epoch
    #  within its first epoch, 2031: 3 and 1 are seen, then 0213 brings 02 as new and 13 as seen
    assert drawn(monkeypatch, FOUR, 7, epochs=3) == "# #. .."


def test_a_run_that_is_cut_short_asks_for_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, FOUR, epochs=3, max_steps=9) == "## ## ## ## ."


def test_only_what_a_later_epoch_of_the_phase_may_ask_for_is_worth_keeping() -> None:
    spec = DataSpec("synthetic", 4, 0, 0, (1, 1, 1), 2)
    config = TrainConfig(order="sequential", batch=2, epochs=3, cache="memory", max_steps=11)
    known = SeenInPhase(Itinerary(config, EvaluateConfig(), spec, 2), 0, 4, 0)
    #                                            stage 0   stage 1, two epochs and one step more
    assert "".join(".#"[known.again(step)] for step in range(11)) == "......####."


def test_the_order_of_an_epoch_is_that_of_the_loader() -> None:
    spec = DataSpec("synthetic", 7, 0, 0, (1, 1, 1), 2)
    config = TrainConfig(order="sequential", batch=4, epochs=2, drop_last=True, cache="memory")
    known = SeenInPhase(Itinerary(config, EvaluateConfig(), spec, 2), 5, 7, 0)
    first = epoch_order(5, 2, 7)  # stage 1 begins with epoch 2, of one step
    assert [bool(known.all(3, first[[place]])) for place in range(7)] == [True] * 4 + [False] * 3


def test_without_a_cache_nothing_is_seen_nor_kept() -> None:
    assert not NothingSeen().all(100, np.arange(2))
    assert not NothingSeen().again(0)
