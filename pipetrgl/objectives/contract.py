"""The criterion contract: what a rival of the transport cost makes of a stage's task loss.

z ──▶ blocks ──▶ h ──▶ head ──▶ task loss ──┐
z or image ──────┴───────────────────────▶ criterion ──▶ local loss

A criterion is a module, for it may have layers of its own; they count as the head's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StageFacts:
    """What a criterion may be made for; shapes are of one sample.

    Attributes:
        came_in, hands_on: of z and h.
        image: of what stage 0 gets.
        mean, std: of each of the image's channels, of pixels scaled to [0, 1].
    """

    stage: int
    num_stages: int
    came_in: Shape
    hands_on: Shape
    image: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int


class Criterion(Protocol):
    """A callable `nn.Module`, used in training only."""

    def __call__(self, source: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        """The local loss.

        Args:
            source: the image where it rides along (`ObjectiveConfig.needs_images`), else z, what came into the stage,
                which in stage 0 is the image; detached; it must not be changed in place.
            h: what the stage hands on, with graph.
            target: (N,).
            loss: task loss, and the weighted transport cost where there is one; with graph.
        """


@final
class AsItIs(nn.Module):
    """For the objectives that are whole without it: trgl and vangl."""

    def forward(self, source: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        return loss
