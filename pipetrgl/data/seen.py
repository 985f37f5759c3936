"""What a learning stage has seen of the training split, so that what is frozen before it need not be run again.

one phase, 3 samples, batches of 2, the rest of one row left out      ■ run through all stages   · recalled
order     2 0 | 1     0 1 | 2     1 2 | 0
          ■           ■           ·             1 was left out of the first epoch, so its batch is run once more
"""

from __future__ import annotations

import functools
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from pipetrgl.data.dataset import Indices
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.data.order import epoch_order


class Seen(Protocol):
    """Answers for the stage that learns in an optimizer step; the same in every worker."""

    def all(self, step: int, positions: Indices) -> bool:
        """Whether it has been handed each of these samples before, in its phase."""

    def again(self, step: int) -> bool:
        """Whether a later epoch of its phase may ask for what it is handed in this one."""


@final
class NothingSeen:
    """No stage remembers what it was handed."""

    def all(self, step: int, positions: Indices) -> bool:
        return False

    def again(self, step: int) -> bool:
        return False


@final
class SeenInPhase:
    """A stage remembers what it was handed since its phase began, or since the run went on within it.

    Stage 0 needs no memory: it is handed the images themselves.

    Args:
        itinerary: of the run.
        seed: of the run.
        num_samples: of the training split.
        first_step: that this stream begins with; before it nothing is remembered.
    """

    def __init__(self, itinerary: Itinerary, seed: int, num_samples: int, first_step: int) -> None:
        self._itinerary = itinerary
        self._sweep = itinerary.sweep
        self._seed = seed
        self._num_samples = num_samples
        self._first_step = first_step
        self._unseen = functools.lru_cache(maxsize=2)(self._find_unseen)

    def all(self, step: int, positions: Indices) -> bool:
        phase = self._sweep.phase_of(step)
        if phase.learners.start == 0:
            return False
        begin = max(phase.steps.start, self._first_step)
        return not self._unseen(begin, self._epoch(step))[positions].any()

    def again(self, step: int) -> bool:
        phase = self._sweep.phase_of(step)
        return phase.learners.start > 0 and self._epoch(step) < self._epoch(phase.steps[-1])

    def _epoch(self, step: int) -> int:
        return step // self._itinerary.steps_per_epoch

    def _find_unseen(self, begin: int, epoch: int) -> NDArray[np.bool_]:
        """By sample: whether it is in no batch of an earlier epoch since step `begin`; an epoch has each only once."""
        if epoch == self._epoch(begin):
            return np.ones(self._num_samples, dtype=np.bool_)
        unseen = self._unseen(begin, epoch - 1).copy()
        visited = self._itinerary.visited_rows(max(begin, (epoch - 1) * self._itinerary.steps_per_epoch))
        unseen[epoch_order(self._seed, epoch - 1, self._num_samples)[visited.start : visited.stop]] = False
        return unseen
