"""What a plan would give if something were different: the plan under other terms, simulated and summed up."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import final

import numpy as np

from pipetrgl.errors import ConfigError
from pipetrgl.studies.costs import LinkSpeed
from pipetrgl.studies.planner import Pricing
from pipetrgl.studies.planning import Plan, make_plan
from pipetrgl.studies.simulator import Pipe, Simulation, simulate

_MAX_ROWS = 16


@final
@dataclass(frozen=True)
class Changes:
    """What shall be different; None leaves it as the plan has it.

    Attributes:
        workers: plan anew for so many, from the plan's profile.
        repeat: the stages so many times in a row.
        batch: rows of a micro-batch; times and bytes grow in proportion.
        speed: of every device, in those of the profiled one; links stay as they are.
        capacity: slots of each link.
        link_gbps: bandwidth of each link in gigabits a second; the latency stays.
        jitter, stragglers: as in `simulate`; stragglers as "stage:factor".
    """

    workers: int | None = None
    repeat: int = 1
    batch: int | None = None
    speed: float = 1.0
    capacity: int | None = None
    link_gbps: float | None = None
    jitter: float = 0.0
    stragglers: tuple[str, ...] = ()


def answer(plan: Plan, num_batches: int, changes: Changes) -> str:
    """What `pipetrgl simulate` prints.

    Raises:
        ConfigError: a straggler that is no stage:factor, or no such stage.
    """
    plan = changed(plan, changes)
    pipe = pipe_of(plan).repeated(changes.repeat)
    stragglers = dict(_straggler(text, len(pipe.forward_s)) for text in changes.stragglers)
    return _summary(plan, pipe, simulate(pipe, num_batches, changes.jitter, stragglers))


def changed(plan: Plan, changes: Changes) -> Plan:
    """The plan under other terms: with its own cuts, or with new ones for another number of workers."""
    link = plan.terms.link
    if changes.link_gbps is not None:
        link = LinkSpeed(link.latency_s, changes.link_gbps * 1e9 / 8)
    terms = dataclasses.replace(plan.terms, link=link, capacity=changes.capacity or plan.terms.capacity)
    profile = plan.profile.scaled(changes.batch or plan.profile.rows, changes.speed)
    if changes.workers is not None:
        return make_plan(profile, dataclasses.replace(terms, workers=changes.workers))
    price = Pricing(profile.units, terms)
    stages = tuple(price.stage(stage.first, stage.stop, stage.replicas) for stage in plan.stages)
    return Plan(profile, terms, stages)


def pipe_of(plan: Plan) -> Pipe:
    """A plan's stages and links as the simulator takes them; replicas of a stage work in step."""
    return Pipe(
        forward_s=[stage.forward_s for stage in plan.stages],
        backward_s=[stage.backward_s + stage.update_s + stage.all_reduce_s for stage in plan.stages],
        link_s=plan.link_times(),
        capacity=plan.terms.capacity,
    )


def _straggler(text: str, num_stages: int) -> tuple[int, float]:
    stage, colon, factor = text.partition(":")
    try:
        number, times = int(stage), float(factor)
    except ValueError:
        number, times = -1, math.nan
    if not colon or not 0 <= number < num_stages or not (0 < times < math.inf):
        raise ConfigError(
            f"--straggler: '{text}'; expected stage:factor, a stage of 0 to {num_stages - 1}, as in 0:1.5"
        )
    return number, times


def _summary(plan: Plan, pipe: Pipe, done: Simulation) -> str:
    num_stages, num_batches = done.end_s.shape
    ideal_s = plan.slowest.period_s
    rows = plan.profile.rows
    lines = [
        f"{num_stages} stages, {num_batches:,} micro-batches of {rows}, capacity {pipe.capacity}, links of "
        f"{plan.terms.link.bytes_per_s * 8 / 1e9:.2f} Gbit/s",
        f"{rows / done.period_s:,.1f} images/s once full, {100 * ideal_s / done.period_s:.1f} % of the plan's rate on "
        f"these links; with filling and draining {rows * num_batches / done.total_s:,.1f}",
        f"fill {done.fill_s:.3f} s, in all {done.total_s:.3f} s",
    ]
    busy, memory = done.utilisation, [stage.memory_bytes / 2**20 for stage in plan.stages]
    if num_stages <= _MAX_ROWS:
        lines += [
            f"stage {number}: computes {100 * share:.1f} % of its time, {memory[number % len(memory)]:.1f} MiB"
            for number, share in enumerate(busy)
        ]
    else:
        lines.append(
            f"stages compute {100 * busy.min():.1f} % (stage {int(busy.argmin())}) to {100 * busy.max():.1f} % (stage "
            f"{int(busy.argmax())}) of their time, median {100 * np.median(busy):.1f} %; at most "
            f"{max(memory):.1f} MiB each"
        )
    return "\n".join(lines)
