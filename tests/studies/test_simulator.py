"""The simulator on staircases counted by hand, drawn with f forward, b backward, w a wait, = the link."""

from __future__ import annotations

import numpy as np
import pytest

from pipetrgl.studies.simulator import Pipe, Simulation, simulate


def rows(times: object) -> list[list[float]]:
    return np.asarray(times).tolist()


def one_by_one(pipe: Pipe, num_batches: int) -> list[list[float]]:
    """`end` by the recursion as written, one entry at a time."""
    count, never = len(pipe.forward_s), 0.0
    end: dict[tuple[int, int], float] = {}
    taken: dict[tuple[int, int], float] = {}
    for m in range(num_batches):
        for k in range(count):
            start = max(end.get((k, m - 1), never), taken.get((k - 1, m), never))
            sent = max(start + pipe.forward_s[k], taken.get((k, m - 1), never))
            end[k, m] = sent + pipe.backward_s[k]
            slot = end.get((k + 1, m - pipe.capacity), never)
            taken[k, m] = max(sent, slot) + (pipe.link_s[k] if k < count - 1 else 0.0)
    return [[end[k, m] for m in range(num_batches)] for k in range(count)]


def test_two_equal_stages_are_a_staircase() -> None:
    #  time     0 1 2 3 4 5 6 7
    #  stage 0  f b f b f b
    #           =   =   =            the link takes no time: taken when sent
    #  stage 1    f b f b f b
    done = simulate(Pipe([1, 1], [1, 1], [0, 0], capacity=2), 3)
    assert rows(done.start_s) == [[0, 2, 4], [1, 3, 5]]
    assert rows(done.end_s) == [[2, 4, 6], [3, 5, 7]]
    assert (done.fill_s, done.total_s, done.period_s) == (1, 7, 2)
    assert rows(done.utilisation) == [1, 1]


def test_a_link_delays_the_next_stage_once_and_runs_beside_the_backward() -> None:
    #  time     0 1 2 3 4 5 6 7 8
    #  stage 0  f b f b f b
    #             = = = = = =        sent at 1, 3, 5; on the link for 2
    #  stage 1        f b f b f b
    done = simulate(Pipe([1, 1], [1, 1], [2, 0], capacity=2), 3)
    assert rows(done.taken_s)[0] == [3, 5, 7]
    assert rows(done.start_s)[1] == [3, 5, 7]
    assert (done.fill_s, done.period_s) == (3, 2)


def test_a_link_slower_than_both_stages_sets_the_pace() -> None:
    #  time     0 1 2 3 4 5 6 7 8 9
    #  stage 0  f b f w b f w b          a send waits for the one before: at 1, 4, 7
    #             = = = = = = = = =
    #  stage 1          f b   f b   f b  at 4, 7, 10
    done = simulate(Pipe([1, 1], [1, 1], [3, 0], capacity=2), 3)
    assert rows(done.sent_s)[0] == [1, 4, 7]
    assert rows(done.start_s)[1] == [4, 7, 10]
    assert done.period_s == 3


def test_a_full_link_makes_a_fast_stage_wait() -> None:
    #  time     0 1 2 3 4 5 6 7 8 9 ...      capacity 1: one in the slot, one on its way
    #  stage 0  f b f b f w w w b f ..       0 taken at 1, 1 at 7 when the slot is free, so 2 is sent at 7
    #  stage 1    f f f b b b f f f b b b
    done = simulate(Pipe([1, 3], [1, 3], [0, 0], capacity=1), 4)
    assert rows(done.taken_s)[0][:3] == [1, 7, 13]
    assert rows(done.sent_s)[0] == [1, 3, 7, 13]
    assert rows(done.start_s)[1] == [1, 7, 13, 19]


def test_a_second_slot_hides_the_link() -> None:
    pipe = ([1.0, 1.0], [1.0, 1.0], [1.0, 0.0])
    assert simulate(Pipe(*pipe, capacity=1), 50).period_s == 3
    assert simulate(Pipe(*pipe, capacity=2), 50).period_s == 2


def test_the_wavefront_equals_the_recursion_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        count, num_batches, capacity = (int(number) for number in rng.integers(1, (7, 12, 5)))
        times = [rng.integers(0, 9, count).tolist() for _ in range(3)]
        pipe = Pipe(*times, capacity=capacity)
        assert rows(simulate(pipe, num_batches).end_s) == one_by_one(pipe, num_batches)


def test_the_rate_is_that_of_the_slowest_stage_or_link() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        forward, backward, link = (rng.uniform(0.5, 2, 6).tolist() for _ in range(3))
        slowest = max(*(f + b for f, b in zip(forward, backward, strict=True)), *link[:-1])
        # float rounding only: without jitter the pipe settles exactly
        assert simulate(Pipe(forward, backward, link, 4), 200).period_s == pytest.approx(slowest, rel=1e-9)


def test_a_straggler_slows_all_and_leaves_the_others_idle() -> None:
    done = simulate(Pipe([1] * 3, [1] * 3, [0] * 3, 2), 100, stragglers={1: 2.0})
    assert done.period_s == 4
    assert done.utilisation[1] == 1 and done.utilisation[2] == pytest.approx(0.5, abs=0.01)


def test_jitter_costs_time_and_a_deeper_link_costs_less() -> None:
    def period_s(capacity: int) -> float:
        return simulate(Pipe([1] * 8, [1] * 8, [0] * 8, capacity), 500, jitter=0.5).period_s

    assert 2.0 < period_s(8) < period_s(1)


def test_a_thousand_micro_batches_pass_1024_workers() -> None:
    done = simulate(Pipe([1] * 4, [2] * 4, [0.5] * 4, 4).repeated(256), 1000)
    assert isinstance(done, Simulation) and done.end_s.shape == (1024, 1000)
    #  1,023 times forward and link, then 1,000 micro-batches of 3
    assert (done.fill_s, done.total_s) == (1023 * 1.5, 1023 * 1.5 + 3000)
