"""The criterion of each stage, by the objective's name."""

from __future__ import annotations

from torch import nn

from pipetrgl.config.schema import ObjectiveConfig
from pipetrgl.objectives.contract import AsItIs
from pipetrgl.objectives.infopro import InfoPro, on_the_line
from pipetrgl.objectives.predsim import PredSim

Shape = tuple[int, ...]


def build(
    config: ObjectiveConfig, stage: int, num_stages: int, came_in: Shape, hands_on: Shape, num_classes: int
) -> nn.Module:
    """A fresh `Criterion`, not initialised.

    Raises:
        ModelError: the objective is not defined for such activations.
    """
    if config.name == "predsim":
        return PredSim(config.predsim.beta, hands_on, num_classes)
    if config.name == "infopro" and stage < num_stages - 1:
        ends = config.infopro.reconstruction, config.infopro.task
        reconstruction, task = (on_the_line(each, stage, num_stages) for each in ends)
        return InfoPro((reconstruction, task), came_in, hands_on)
    return AsItIs()
