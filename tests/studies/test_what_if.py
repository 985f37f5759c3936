"""What-if questions about a plan that one can answer by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipetrgl.errors import ConfigError
from pipetrgl.studies import planning
from pipetrgl.studies.what_if import Changes, answer, changed, pipe_of
from tests.studies.test_planning import by_hand
from tests.test_cli import pipetrgl, refused


def test_the_pipe_has_the_stages_and_links_of_the_plan() -> None:
    pipe = pipe_of(by_hand(4))  # 2 | 2 units of 1 + 2 s, 8 bytes over a link of 1 s + 1 s for 4 bytes
    assert (pipe.forward_s, pipe.backward_s, pipe.link_s, pipe.capacity) == ([2, 2], [4, 4], [3, 0], 4)


def test_a_slow_link_makes_the_rate_its_own() -> None:
    #  1 s + 8 bytes * 8 bit / 8 bit a second = 9 s in place of 6 s; 16 rows
    text = answer(by_hand(4), 100, Changes(link_gbps=8e-9))
    assert "1.8 images/s once full, 100.0 % of the plan's rate on these links" in text


def test_a_straggler_and_a_repeated_network_are_told_by_their_stages() -> None:
    text = answer(by_hand(4), 200, Changes(repeat=2, stragglers=("3:2",)))
    assert text.startswith("4 stages, 200 micro-batches of 16, capacity 4,")
    assert "50.0 % of the plan's rate" in text and "stage 3: computes 100.0 % of its time" in text
    assert "stage 0 " not in answer(by_hand(4), 5, Changes(repeat=512))


def test_more_workers_are_planned_anew_and_more_slots_take_memory() -> None:
    plan = by_hand(4)
    assert changed(plan, Changes(workers=4)).cuts == [1, 1, 1, 1]
    #  four slots of 8 bytes more
    assert changed(plan, Changes(capacity=8)).stages[0].memory_bytes == plan.stages[0].memory_bytes + 4 * 8


def test_half_the_rows_take_half_of_time_and_bytes_and_a_faster_device_leaves_the_links_as_they_are() -> None:
    plan = changed(by_hand(4), Changes(batch=8, speed=2.0))
    pipe = pipe_of(plan)  # a fourth of 2 + 4 s; 1 s + 4 bytes of 4 a second
    assert (pipe.forward_s, pipe.backward_s, pipe.link_s) == ([0.5, 0.5], [1, 1], [2, 0])
    assert plan.slowest.period_s == 2
    assert plan.profile.rows == 8
    before, after = by_hand(4).profile.units[0], plan.profile.units[0]
    assert (after.opening.saved_bytes, after.input_bytes) == (before.opening.saved_bytes / 2, before.input_bytes / 2)
    assert after.opening.state_bytes == before.opening.state_bytes
    assert changed(by_hand(4), Changes(batch=16, speed=1.0)) == by_hand(4)


@pytest.mark.parametrize("text", ["1", "2:1.5", "-1:2", "0:0", "0:nan", "a:2", "0:"])
def test_a_straggler_that_is_none_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--straggler: '{text}'; expected stage:factor, a stage of 0 to 1"):
        answer(by_hand(4), 5, Changes(stragglers=(text,)))


def test_the_command_reads_a_plan_and_refuses_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(planning.to_dict(by_hand(4), {})))
    done = pipetrgl(tmp_path, "simulate", "plan.json", "--batches", "10", "--straggler", "0:2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 stages, 10 micro-batches of 16")
    (tmp_path / "plan.json").write_text("{}")
    assert "is no plan of `pipetrgl plan`" in refused(pipetrgl(tmp_path, "simulate", "plan.json"))
