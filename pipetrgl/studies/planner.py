"""The planner: the cuts and the replicas of each stage that make the slowest stage as fast as possible, exactly.

    T = max over stages k of max((F_k + B_k) / R_k + U_k + all_reduce_k, link_k)        sum of R_k <= workers

    best[i][w] = min over j < i, r <= w of max(best[j][w - r], T of a stage of units j .. i - 1 on r workers)

F, B, U: forward, backward and update of the stage's blocks and head. link_k is the slower of the links into and out of
one replica, each with its R_k-th of the rows: so a link between R and S replicas costs what the side with fewer needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

from pipetrgl.errors import ConfigError
from pipetrgl.studies.costs import Cost, LinkSpeed, UnitCost


@final
@dataclass(frozen=True)
class Terms:
    """What a plan has to work with.

    Attributes:
        workers: at most so many are used; fewer where more would not be faster.
        link: the same between all workers.
        capacity: slots of each link, all of which may be filled.
        accumulate: micro-batches of one step, which share one all-reduce.
        max_replicas: of a stage.
        memory_bytes: of each worker; None sets no limit.
    """

    workers: int
    link: LinkSpeed
    capacity: int = 4
    accumulate: int = 1
    max_replicas: int = 1
    memory_bytes: int | None = None


@final
@dataclass(frozen=True)
class PlannedStage:
    """Units `first` .. `stop - 1` on `replicas` workers; times of one micro-batch, bytes of each worker.

    Attributes:
        forward_s, backward_s: of one replica's share of the rows.
        update_s, all_reduce_s: divided by the micro-batches of a step.
        link_s: of the slower of its links; 0 without any.
        wire_bytes: of the output of all replicas; 0 for the last stage.
        memory_bytes: weights and optimizer, saved activations, input slots and one output on its way.
    """

    first: int
    stop: int
    replicas: int
    forward_s: float
    backward_s: float
    update_s: float
    all_reduce_s: float
    link_s: float
    wire_bytes: int
    memory_bytes: int

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s + self.all_reduce_s

    @property
    def period_s(self) -> float:
        """Between two micro-batches."""
        return max(self.compute_s, self.link_s)


def plan(units: Sequence[UnitCost], terms: Terms, use_all: bool = False) -> tuple[PlannedStage, ...]:
    """The stages whose slowest is fastest; among equals the fewest workers, then the earliest last cut.

    Args:
        units: in forward order.
        terms: workers, link and limits.
        use_all: have every worker do something, also where fewer would be as fast.
    Raises:
        ConfigError: no cuts fit the memory limit; says which limit they would fit.
    """
    price = Pricing(units, terms)
    limit = math.inf if terms.memory_bytes is None else terms.memory_bytes
    counts = range(terms.workers if use_all else 1, terms.workers + 1)
    within = lambda stage: stage.period_s if stage.memory_bytes <= limit else math.inf  # noqa: E731
    stages = _best(len(units), terms, price.stage, within, counts)
    if stages is None:
        smallest = _best(len(units), terms, price.stage, lambda stage: stage.memory_bytes, counts)
        assert smallest is not None
        needed = max(stage.memory_bytes for stage in smallest)
        raise ConfigError(
            f"no cuts into at most {terms.workers} stages fit {limit / 2**20:,.1f} MiB a worker; the least that "
            f"{terms.workers} workers could do with is {math.ceil(needed / 2**20 * 10) / 10:,.1f} MiB"
        )
    return stages


@final
class Pricing:
    """What any stage costs, alone or beside its neighbours."""

    def __init__(self, units: Sequence[UnitCost], terms: Terms) -> None:
        self._units = units
        self._terms = terms

    def stage(self, first: int, stop: int, replicas: int) -> PlannedStage:
        cost = stage_cost(self._units[first:stop])
        units, terms, link = self._units, self._terms, self._terms.link
        incoming = units[first - 1].wire_bytes if first > 0 else 0
        outgoing = units[stop - 1].wire_bytes if stop < len(units) else 0
        has_link = first > 0 or stop < len(units)
        on_its_way = units[stop - 1].output_bytes if stop < len(units) else 0
        held = cost.saved_bytes + terms.capacity * units[first].input_bytes + on_its_way
        return PlannedStage(
            first=first,
            stop=stop,
            replicas=replicas,
            forward_s=cost.forward_s / replicas,
            backward_s=cost.backward_s / replicas,
            update_s=cost.update_s,
            all_reduce_s=link.all_reduce_s(cost.gradient_bytes, replicas) / terms.accumulate,
            link_s=link.time_s(max(incoming, outgoing) / replicas) if has_link else 0.0,
            wire_bytes=outgoing,
            memory_bytes=cost.state_bytes + math.ceil(held / replicas),
        )


def stage_cost(units: Sequence[UnitCost]) -> Cost:
    """Of a stage that consists of these units and the head behind the last."""
    return [*accumulate([units[0].opening, *(unit.inner for unit in units[1:]), units[-1].head])][-1]


Price = Callable[[int, int, int], PlannedStage]
Value = Callable[[PlannedStage], float]


def _best(num_units: int, terms: Terms, price: Price, value: Value, counts: range) -> tuple[PlannedStage, ...] | None:
    """The stages whose largest value is smallest, on one of `counts` workers; None if it is infinite."""
    workers = terms.workers
    replicas = range(1, min(terms.max_replicas, workers) + 1)
    worst = [[math.inf] * (workers + 1) for _ in range(num_units + 1)]  # worst[i][w]: first i units on w workers
    last: dict[tuple[int, int], PlannedStage] = {}
    worst[0][0] = -math.inf
    for stop in range(1, num_units + 1):
        for first in range(stop):
            for count in replicas:
                stage = price(first, stop, count)
                own = value(stage)
                for used in range(count, workers + 1):
                    slowest = max(worst[first][used - count], own)
                    if slowest < worst[stop][used]:
                        worst[stop][used], last[stop, used] = slowest, stage
    used = min(counts, key=lambda count: worst[num_units][count])
    if worst[num_units][used] == math.inf:
        return None
    stages: list[PlannedStage] = []
    stop = num_units
    while stop > 0:
        stage = last[stop, used]
        stages.append(stage)
        stop, used = stage.first, used - stage.replicas
    return tuple(reversed(stages))
