"""What a point of a bench should give, from its profile and a link: the simulator on the stages as they are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from pipetrgl.studies.planner import Pricing, Terms
from pipetrgl.studies.planning import Plan
from pipetrgl.studies.profile import Profile
from pipetrgl.studies.simulator import simulate
from pipetrgl.studies.what_if import pipe_of

_NUM_BATCHES = 200


@final
@dataclass(frozen=True)
class Prediction:
    """Images a second, once the pipe is full.

    Attributes:
        pipeline: of all stages at work.
        serial: of one worker that computes the same stages, with the same heads, one after another.
        stages: of each stage alone.
        cpu_share: of the profile that it comes from.
    """

    pipeline: float
    serial: float
    stages: tuple[float, ...]
    cpu_share: float | None = None

    def of(self, contender: str) -> float | None:
        """By a contender's name; None where no prediction is made."""
        stages = {f"stage {index}": rate for index, rate in enumerate(self.stages)}
        return {"pipetrgl": self.pipeline, "serial": self.serial, **stages}.get(contender)


def predict(profile: Profile, terms: Terms, counts: Sequence[int]) -> Prediction:
    """Args:
    profile: of the point's batch and codec.
    terms: its link and capacity.
    counts: counted blocks of each stage.
    """
    price, bounds = Pricing(profile.units, terms), [0, *itertools.accumulate(counts)]
    stages = tuple(price.stage(first, stop, 1) for first, stop in itertools.pairwise(bounds))
    pipe = pipe_of(Plan(profile, terms, stages))
    rows = profile.rows
    return Prediction(
        pipeline=rows / simulate(pipe, _NUM_BATCHES).period_s,
        serial=rows / sum(stage.compute_s for stage in stages),
        stages=tuple(rows / stage.compute_s for stage in stages),
        cpu_share=profile.cpu_share,
    )
