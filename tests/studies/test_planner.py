"""The planner on networks that one can plan by hand, and against brute force on random ones."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from pipetrgl.errors import ConfigError
from pipetrgl.studies.costs import Cost, LinkSpeed, UnitCost
from pipetrgl.studies.planner import Terms, plan

FAST = LinkSpeed(latency_s=0.0, bytes_per_s=1e12)


def unit(work_s: float, head_s: float = 0.0, wire_bytes: int = 0, saved_bytes: int = 0) -> UnitCost:
    cost = Cost(forward_s=work_s / 4, backward_s=work_s * 3 / 4, saved_bytes=saved_bytes)
    return UnitCost(("block",), cost, cost, Cost(forward_s=head_s), 0, 0, wire_bytes)


def cuts(units: list[UnitCost], terms: Terms) -> list[tuple[int, int]]:
    return [(stage.stop - stage.first, stage.replicas) for stage in plan(units, terms)]


def test_cuts_make_the_slowest_stage_as_fast_as_possible() -> None:
    #  4 4 | 2 2 2 2: both stages 8
    assert cuts([unit(t) for t in (4, 4, 2, 2, 2, 2)], Terms(2, FAST)) == [(2, 1), (4, 1)]


def test_a_dear_head_moves_the_cut() -> None:
    #  1 1 1 1: [1 1][1 1] would pay the head of 3 behind the second unit, [1 1 1][1] pays none: 3 in place of 5
    units = [unit(1), unit(1, head_s=3), unit(1), unit(1)]
    assert cuts(units, Terms(2, FAST)) == [(1, 1), (3, 1)]


def test_a_slow_link_forbids_the_cut_and_leaves_workers_idle() -> None:
    slow = LinkSpeed(latency_s=1.0, bytes_per_s=1.0)  # 10 bytes take 11 s, the whole network 4 s
    assert cuts([unit(2, wire_bytes=10), unit(2, wire_bytes=10)], Terms(2, slow)) == [(2, 1)]


def test_a_heavy_middle_gets_the_replicas() -> None:
    #  1 | 2 | 1 on four workers: 1 / 1, 2 / 2, 1 / 1
    units = [unit(1), unit(2), unit(1)]
    assert cuts(units, Terms(4, FAST, max_replicas=2)) == [(1, 1), (1, 2), (1, 1)]


def test_replicas_pay_their_own_update_and_the_all_reduce() -> None:
    cost = Cost(forward_s=2.0, backward_s=4.0, update_s=1.0, gradient_bytes=10)
    only = UnitCost(("block",), cost, cost, Cost(), 0, 0, 0)
    (stage,) = plan([only], Terms(2, LinkSpeed(0.25, 10.0), max_replicas=2))
    #  6 / 2 + 1 + two steps of a ring, each 0.25 + 5 bytes / 10
    assert (stage.replicas, stage.period_s) == (2, 3 + 1 + 2 * 0.75)


def test_the_first_unit_of_a_stage_costs_its_opening_time() -> None:
    units = [UnitCost(("block",), Cost(backward_s=1.0), Cost(backward_s=2.0), Cost(), 0, 0, 0)] * 4
    assert [stage.period_s for stage in plan(units, Terms(2, FAST))] == [3.0, 3.0]


def test_the_memory_limit_moves_the_cut_and_an_impossible_one_says_what_would_do() -> None:
    mib = 2**20
    units = [unit(1, saved_bytes=3 * mib), unit(1, saved_bytes=3 * mib), unit(1), unit(5)]
    assert cuts(units, Terms(2, FAST)) == [(3, 1), (1, 1)]
    assert cuts(units, Terms(2, FAST, memory_bytes=4 * mib)) == [(1, 1), (3, 1)]
    with pytest.raises(ConfigError, match="fit 2.0 MiB a worker; the least that 2 workers could do with is 3.0 MiB"):
        plan(units, Terms(2, FAST, memory_bytes=2 * mib))


def random_case(rng: random.Random) -> tuple[list[UnitCost], Terms]:
    def cost() -> Cost:
        times = (rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 3))
        return Cost(*times, rng.randint(0, 20), rng.randint(0, 9), rng.randint(0, 9))

    units = [
        UnitCost(("block",), cost(), cost(), cost(), rng.randint(0, 5), rng.randint(0, 9), rng.randint(0, 30))
        for _ in range(rng.randint(1, 6))
    ]
    link = LinkSpeed(rng.choice([0.0, 1.0, 4.0]), rng.choice([1.0, 4.0, 1e9]))
    memory = rng.choice([None, None, rng.randint(20, 120)])
    return units, Terms(rng.randint(1, 5), link, rng.randint(1, 4), rng.randint(1, 2), rng.randint(1, 3), memory)


def slowest_by_hand(units: list[UnitCost], terms: Terms, bounds: tuple[int, ...], replicas: tuple[int, ...]) -> float:
    """Written from the formula alone, link by link; infinite where a worker's memory does not do."""
    slowest, edges = 0.0, list(itertools.pairwise(bounds))
    for (first, stop), count in zip(edges, replicas, strict=True):
        parts = [units[first].opening, *(u.inner for u in units[first + 1 : stop]), units[stop - 1].head]
        work = sum(part.forward_s + part.backward_s for part in parts) / count
        ring = terms.link.latency_s + sum(part.gradient_bytes for part in parts) / count / terms.link.bytes_per_s
        all_reduce = 2 * (count - 1) * ring / terms.accumulate
        held = sum(part.saved_bytes for part in parts) + terms.capacity * units[first].input_bytes
        held += units[stop - 1].output_bytes if stop < len(units) else 0
        memory = sum(part.state_bytes for part in parts) + math.ceil(held / count)
        if terms.memory_bytes is not None and memory > terms.memory_bytes:
            return math.inf
        slowest = max(slowest, work + sum(part.update_s for part in parts) + all_reduce)
    for stop, sides in zip(bounds[1:-1], itertools.pairwise(replicas), strict=True):
        link = terms.link.latency_s + units[stop - 1].wire_bytes / min(sides) / terms.link.bytes_per_s
        slowest = max(slowest, link)
    return slowest


def all_plans(num_units: int, terms: Terms) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for num_stages in range(1, min(num_units, terms.workers) + 1):
        for inner in itertools.combinations(range(1, num_units), num_stages - 1):
            for replicas in itertools.product(range(1, terms.max_replicas + 1), repeat=num_stages):
                if sum(replicas) <= terms.workers:
                    yield (0, *inner, num_units), replicas


def test_the_plan_equals_brute_force_on_400_random_networks() -> None:
    rng, impossible = random.Random(0), 0
    for _ in range(400):
        units, terms = random_case(rng)
        best = min(slowest_by_hand(units, terms, *found) for found in all_plans(len(units), terms))
        if best == math.inf:
            impossible += 1
            with pytest.raises(ConfigError, match="no cuts into at most"):
                plan(units, terms)
            continue
        stages = plan(units, terms)
        bounds = (0, *(stage.stop for stage in stages))
        replicas = tuple(stage.replicas for stage in stages)
        assert sum(replicas) <= terms.workers and max(replicas) <= terms.max_replicas
        # the same numbers added in another order
        assert slowest_by_hand(units, terms, bounds, replicas) == pytest.approx(best, rel=1e-12)
        assert max(stage.period_s for stage in stages) == pytest.approx(best, rel=1e-12)
    assert impossible < 150
