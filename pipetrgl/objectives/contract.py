"""The criterion contract: what a rival of the transport cost makes of a stage's task loss.

z ──▶ blocks ──▶ h ──▶ head ──▶ task loss ──┐
└──────┬─────────┘                          ▼
       └────────────────────────────▶ criterion ──▶ local loss

A criterion is a module, for it may have layers of its own; they count as the head's.
"""

from __future__ import annotations

from typing import Protocol, final

from torch import Tensor, nn


class Criterion(Protocol):
    """A callable `nn.Module`, used in training only."""

    def __call__(self, z: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        """The local loss.

        Args:
            z: what came into the stage, detached; it must not be changed in place.
            h: what the stage hands on, with graph.
            target: (N,).
            loss: task loss, and the weighted transport cost where there is one; with graph.
        """


@final
class AsItIs(nn.Module):
    """For the objectives that are whole without it: trgl and vangl."""

    def forward(self, z: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        return loss
