"""How a process belongs to a run, and what messages call it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipetrgl.channels.c10d import Store
from pipetrgl.world import Place


@dataclass(frozen=True)
class Membership:
    """How a process belongs to a run.

    Attributes:
        store: of the run, with its prefix; cloned for the heartbeat.
        place: rank, stage and replica.
        device: of the stage.
        address: of this machine, as the other workers reach it.
        supervised: a launcher looks after all workers: it decides what a failure means and when everybody may leave.
        incarnation: 0 for the first worker at this place, one more for each that replaces it.
    """

    store: Store
    place: Place
    device: torch.device
    address: str
    supervised: bool = False
    incarnation: int = 0


def name_of(place: Place) -> str:
    if place.rank < 0:
        return "the launcher"
    return f"stage {place.stage} (rank {place.rank})"
