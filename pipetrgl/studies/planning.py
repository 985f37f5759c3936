"""A plan as a value: made from a profile, written as plan.json, read back, and summed up in a table."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from pipetrgl.config.explain import explain
from pipetrgl.config.planned import PLAN_SCHEMA, plan_content
from pipetrgl.config.schema import Config
from pipetrgl.config.source import Entry, Origin
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.start import describe
from pipetrgl.studies.costs import Cost, LinkSpeed, UnitCost
from pipetrgl.studies.link_speed import measure_link
from pipetrgl.studies.planner import PlannedStage, Terms, plan
from pipetrgl.studies.profile import Profile, profile

_BUSY = 0.9


@final
@dataclass(frozen=True)
class Plan:
    """Which units of a profiled network make which stage, and what that should give."""

    profile: Profile
    terms: Terms
    stages: tuple[PlannedStage, ...]

    @property
    def cuts(self) -> list[int]:
        """As `model.cuts`: each unit holds one counted block."""
        return [stage.stop - stage.first for stage in self.stages]

    @property
    def slowest(self) -> PlannedStage:
        return max(self.stages, key=lambda stage: stage.period_s)

    @property
    def num_workers(self) -> int:
        return sum(stage.replicas for stage in self.stages)

    @property
    def limit(self) -> str:
        """What the slowest stage waits for: "compute" or "link"."""
        return "link" if self.slowest.link_s > self.slowest.compute_s else "compute"

    @property
    def images_per_s(self) -> float:
        """Once the pipe is full."""
        return self.profile.rows / self.slowest.period_s

    @property
    def imbalance(self) -> float:
        """The slowest stage's compute time over the mean of all; 1 is balanced."""
        times = [stage.compute_s for stage in self.stages]
        return max(times) * len(times) / sum(times)

    @property
    def speed_up(self) -> float:
        """Over one worker that computes the same stages, with the same heads, one after another."""
        alone = [stage.replicas * (stage.forward_s + stage.backward_s) + stage.update_s for stage in self.stages]
        return sum(alone) / self.slowest.period_s

    def link_times(self) -> list[float]:
        """How long one micro-batch occupies the link behind each stage; of the last stage 0."""
        pairs = itertools.pairwise(self.stages)
        times = [self.terms.link.time_s(here.wire_bytes / min(here.replicas, then.replicas)) for here, then in pairs]
        return [*times, 0.0]

    def names(self, stage: PlannedStage) -> tuple[str, str]:
        """First and last block."""
        units = self.profile.units
        return units[stage.first].blocks[0], units[stage.stop - 1].blocks[-1]


def make_plan(profile: Profile, terms: Terms, use_all: bool = False) -> Plan:
    """The best plan; arguments and errors as of `planner.plan`."""
    return Plan(profile, terms, plan(profile.units, terms, use_all))


def plan_for(
    config: Config, workers: int, max_replicas: int, memory_bytes: int | None = None, repeats: int = 10
) -> Plan:
    """Profile the config's blocks and heads and a link on this machine, then plan.

    Raises:
        DataError, ModelError: as in training.
        ConfigError: no cuts fit `memory_bytes`.
    """
    capacity = config.channel.capacity
    link = measure_link(repeats=5, capacity=capacity)
    terms = Terms(workers, link, capacity, config.train.accumulate, max_replicas, memory_bytes)
    return make_plan(profile(config, describe(config), repeats), terms)


def planned(config: Config, say: Callable[[str], None]) -> Config:
    """The config with what `model.cuts: auto` stands for; any other config as it is.

    Args:
        say: told the plan's summary.
    """
    if config.model.cuts != "auto":
        return config
    counts = config.pipeline.replica_counts
    plan = plan_for(config, workers=sum(counts), max_replicas=max(counts))
    say(summary(plan))
    content: dict[str, Any] = config.model_dump(exclude_unset=True)
    content.setdefault("model", {})["cuts"] = plan.cuts
    pipeline = content.setdefault("pipeline", {})
    pipeline["stages"], pipeline["replicas"] = len(plan.cuts), [stage.replicas for stage in plan.stages]
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        reasons = "\n".join(f"  {problem.text}" for problem in explain(error, Entry({}, Origin(None))))
        raise ConfigError(
            f"model.cuts: auto found cuts {plan.cuts} with replicas {pipeline['replicas']}, which do not go with the "
            f"rest of the config; write model.cuts, or change\n{reasons}"
        ) from None


def to_dict(plan: Plan, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The content of plan.json, docs/run-folder.md."""
    terms = plan.terms
    return {
        "schema": PLAN_SCHEMA,
        "command": "plan",
        "model": plan.profile.network,
        "blocks": [name for unit in plan.profile.units for name in unit.blocks],
        "cuts": plan.cuts,
        "num_stages": len(plan.stages),
        "num_workers": plan.num_workers,
        "images_per_s": plan.images_per_s,
        "imbalance": plan.imbalance,
        "speed_up": plan.speed_up,
        "limit": plan.limit,
        "rows": plan.profile.rows,
        "cpu_share": plan.profile.cpu_share,
        "terms": dataclasses.asdict(terms),
        "stages": [
            {
                "stage": number,
                "blocks": plan.names(stage),
                **dataclasses.asdict(stage),
                "compute_s": stage.compute_s,
                "period_s": stage.period_s,
            }
            for number, stage in enumerate(plan.stages)
        ],
        "units": [dataclasses.asdict(unit) for unit in plan.profile.units],
        "environment": dict(environment),
    }


def read(path: Path) -> Plan:
    """The plan in a plan.json.

    Raises:
        ConfigError: it is none.
    """
    content = plan_content(path)
    try:
        units = tuple(_unit(unit) for unit in content["units"])
        profile = Profile(content["model"], content["rows"], units, content["cpu_share"])
        terms = Terms(**{**content["terms"], "link": LinkSpeed(**content["terms"]["link"])})
        fields = [field.name for field in dataclasses.fields(PlannedStage)]
        stages = tuple(PlannedStage(**{name: stage[name] for name in fields}) for stage in content["stages"])
        return Plan(profile, terms, stages)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is no plan of `pipetrgl plan`: {type(error).__name__} {error}") from None


def _unit(content: Mapping[str, Any]) -> UnitCost:
    costs = {name: Cost(**content[name]) for name in ("opening", "inner", "head")}
    return UnitCost(**{**content, **costs, "blocks": tuple(content["blocks"])})


def summary(plan: Plan) -> str:
    """What `pipetrgl plan` prints."""
    profile, terms = plan.profile, plan.terms
    link = terms.link
    rows = [["stage", "blocks", "replicas", "forward", "backward", "update", "compute", "link", "memory"]]
    for number, stage in enumerate(plan.stages):
        times = (stage.forward_s, stage.backward_s, stage.update_s, stage.compute_s, stage.link_s)
        cells = [str(stage.replicas), *(f"{1e3 * time_s:.1f} ms" for time_s in times)]
        rows.append([str(number), " .. ".join(plan.names(stage)), *cells, f"{stage.memory_bytes / 2**20:.1f} MiB"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    number = plan.stages.index(plan.slowest)
    lines = [
        f"{profile.network}, micro-batches of {profile.rows}: {plan.num_workers} of {terms.workers} workers, "
        f"model.cuts {plan.cuts}",
        *table,
        f"a link: {1e6 * link.latency_s:.0f} us and {link.bytes_per_s / 1e9:.2f} GB/s",
        f"expected {plan.images_per_s:,.1f} images/s, {plan.speed_up:.2f} times one worker; imbalance "
        f"{plan.imbalance:.3f}; stage {number} limits, by {plan.limit}",
    ]
    if profile.cpu_share is not None and profile.cpu_share < _BUSY:
        lines.append(
            f"warning: others kept this machine busy, the profile got {100 * profile.cpu_share:.0f} % of a processor; "
            "its times are too long"
        )
    return "\n".join(lines)
