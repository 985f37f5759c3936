"""The criterion of each stage, by the objective's name."""

from __future__ import annotations

from torch import nn

from pipetrgl.config.schema import InfoProConfig, ObjectiveConfig
from pipetrgl.objectives.contract import AsItIs, StageFacts
from pipetrgl.objectives.infopro import InfoPro, PixelError, UnexplainedShare, on_the_line
from pipetrgl.objectives.predsim import PredSim


def build(config: ObjectiveConfig, facts: StageFacts) -> nn.Module:
    """A fresh `Criterion`, not initialised.

    Raises:
        ModelError: the objective is not defined for such activations.
    """
    if config.name == "predsim":
        return PredSim(config.predsim.beta, facts.hands_on, facts.num_classes)
    if config.name == "infopro" and facts.stage < facts.num_stages - 1:
        return _infopro(config.infopro, facts)
    return AsItIs()


def _infopro(config: InfoProConfig, facts: StageFacts) -> InfoPro:
    ends = config.reconstruction, config.task
    reconstruction, task = (on_the_line(each, facts.stage, facts.num_stages) for each in ends)
    weights = reconstruction, task
    if config.target == "image":
        return InfoPro(weights, PixelError(facts.mean, facts.std), facts.image, facts.hands_on)
    return InfoPro(weights, UnexplainedShare(), facts.came_in, facts.hands_on)
