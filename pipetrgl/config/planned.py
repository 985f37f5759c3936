"""What training reads of a plan.json that `pipetrgl plan` wrote: cuts, replicas, for which network, stages' times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipetrgl.errors import ConfigError

PLAN_SCHEMA = 1
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class PlannedCuts:
    """A plan as far as training follows it.

    Attributes:
        model: the network's name.
        blocks: names of all its blocks.
        cuts: counted blocks of each stage, as in `model.cuts`.
        replicas: of each stage, as in `pipeline.replicas`.
    """

    model: str
    blocks: tuple[str, ...]
    cuts: tuple[int, ...]
    replicas: tuple[int, ...]

    def require_fit(self, model: str, blocks: tuple[str, ...]) -> None:
        """Raises:
        ConfigError: the plan was made for another network.
        """
        if blocks != self.blocks:
            raise ConfigError(
                f"plan: made for {self.model} of {len(self.blocks)} blocks, but this is {model} of {len(blocks)}; run "
                "`pipetrgl plan` with this config"
            )


def read_plan(path: Path) -> PlannedCuts:
    """Read a plan.

    Raises:
        ConfigError: there is none, or training cannot follow it; the message ends a sentence about it.
    """
    content = plan_content(path)
    try:
        plan = PlannedCuts(
            model=str(content["model"]),
            blocks=tuple(map(str, content["blocks"])),
            cuts=tuple(map(int, content["cuts"])),
            replicas=tuple(int(stage["replicas"]) for stage in content["stages"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"'{path}' is no plan of `pipetrgl plan`: {type(error).__name__} {error}") from None
    if not plan.cuts or min(plan.cuts) < 1:
        raise ConfigError(f"'{path}' has a stage without blocks")
    if len(plan.replicas) != len(plan.cuts) or min(plan.replicas) < 1:
        raise ConfigError(f"'{path}' has {len(plan.cuts)} stages, but replicas {list(plan.replicas)}")
    return plan


def planned_times(path: Path) -> dict[str, list[float] | int]:
    """What the stages of a plan take, as `pipeline.emulated` says it; raises as `read_plan`."""
    content = plan_content(path)
    try:
        stages, accumulate = content["stages"], int(content["terms"]["accumulate"])
        # a plan's replica has its share of the rows, and a micro-batch its share of the update
        return {
            "forward_s": [float(stage["forward_s"]) * int(stage["replicas"]) for stage in stages],
            "backward_s": [float(stage["backward_s"]) * int(stage["replicas"]) for stage in stages],
            "update_s": [float(stage["update_s"]) * accumulate for stage in stages],
            "rows": int(content["rows"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"'{path}' has no times of its stages: {type(error).__name__} {error}") from None


def plan_content(path: Path) -> dict[str, Any]:
    """The JSON object of a plan, of the schema that this version knows; raises as `read_plan`."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1)
        content = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"'{path}' does not exist; `pipetrgl plan CONFIG --workers N` writes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("command") != "plan" or content.get("schema") != PLAN_SCHEMA:
        raise ConfigError(f"'{path}' is no plan of `pipetrgl plan` with schema {PLAN_SCHEMA}")
    return content
