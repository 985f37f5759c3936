"""The simulator: when every stage does what with every micro-batch, by the rules of the links (docs/channels.md).

    start[k, m] = max(end[k, m - 1], taken[k - 1, m])                the stage is free, the activation is there
    sent[k, m]  = max(start[k, m] + forward[k, m], taken[k, m - 1])  a send waits until the one before was taken
    end[k, m]   = sent[k, m] + backward[k, m]                        update and all-reduce included
    taken[k, m] = max(sent[k, m], end[k + 1, m - capacity]) + link[k]    the transfer starts once a slot is free

All entries with the same k + 2 m depend only on smaller ones, so they are computed at once: K + 2 M steps in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from pipetrgl.seeds import NUM_DRAWS, jitter_draws

Times = npt.NDArray[np.float64]


@final
@dataclass(frozen=True)
class Pipe:
    """What is simulated; times in seconds of one micro-batch.

    Attributes:
        forward_s, backward_s: of each stage, update and all-reduce with the backward.
        link_s: of the link behind each stage; that of the last is not used.
        capacity: slots of each link.
    """

    forward_s: Sequence[float]
    backward_s: Sequence[float]
    link_s: Sequence[float]
    capacity: int

    def repeated(self, times: int) -> Pipe:
        """A network so many times as deep; a copy hands on to the next over the slowest link."""
        between = max(self.link_s)
        link_s = [*self.link_s[:-1], between] * times
        return Pipe([*self.forward_s] * times, [*self.backward_s] * times, link_s, self.capacity)


@final
@dataclass(frozen=True)
class Simulation:
    """When what happened; arrays (stages, micro-batches) of seconds since the first micro-batch began."""

    start_s: Times
    sent_s: Times
    end_s: Times
    taken_s: Times
    busy_s: Times

    @property
    def fill_s(self) -> float:
        """Until the last stage begins."""
        return float(self.start_s[-1, 0])

    @property
    def total_s(self) -> float:
        """Until the last stage has ended the last micro-batch."""
        return float(self.end_s[-1, -1])

    @property
    def period_s(self) -> float:
        """Between two micro-batches at the last stage, over the second half of them."""
        ends = self.end_s[-1]
        middle = len(ends) // 2
        return float((ends[-1] - ends[middle]) / max(1, len(ends) - 1 - middle)) if len(ends) > 1 else self.total_s

    @property
    def utilisation(self) -> Times:
        """Share of each stage's time, from its first micro-batch to its last, in which it computes."""
        return np.asarray(self.busy_s.sum(axis=1) / (self.end_s[:, -1] - self.start_s[:, 0]))


def simulate(
    pipe: Pipe, num_batches: int, jitter: float = 0.0, stragglers: Mapping[int, float] | None = None, seed: int = 0
) -> Simulation:
    """Run `num_batches` micro-batches through the pipe.

    Args:
        pipe: stages and links.
        num_batches: M.
        jitter: each computation takes 1 - jitter .. 1 + jitter of its time, drawn for each stage and micro-batch.
        stragglers: stages that take so many times as long.
        seed: of the jitter.
    """
    num_stages, capacity = len(pipe.forward_s), pipe.capacity
    slower = np.ones((num_stages, 1))
    for stage, factor in (stragglers or {}).items():
        slower[stage] = factor
    parts = range(-(-num_batches // NUM_DRAWS))
    draws = [np.concatenate([jitter_draws(seed, k, part) for part in parts])[:num_batches] for k in range(num_stages)]
    drawn = slower * (1 + jitter * np.stack(draws))
    forward = np.asarray(pipe.forward_s)[:, None] * drawn
    backward = np.asarray(pipe.backward_s)[:, None] * drawn
    link = np.asarray([*pipe.link_s[: num_stages - 1], 0.0])  # what the last stage hands on is taken at once
    start, sent, end, taken = (np.zeros((num_stages, num_batches)) for _ in range(4))
    for front in range(num_stages + 2 * num_batches - 2):
        first = max(0, (front - num_stages + 2) // 2)
        m = np.arange(first, min(num_batches - 1, front // 2) + 1)
        k = front - 2 * m
        free = np.where(m > 0, end[k, m - 1], 0.0)
        there = np.where(k > 0, taken[k - 1, m], 0.0)
        start[k, m] = np.maximum(free, there)
        before = np.where(m > 0, taken[k, m - 1], 0.0)
        sent[k, m] = np.maximum(start[k, m] + forward[k, m], before)
        end[k, m] = sent[k, m] + backward[k, m]
        has_slot = (m < capacity) | (k == num_stages - 1)
        slot = np.where(has_slot, 0.0, end[np.minimum(k + 1, num_stages - 1), np.maximum(m - capacity, 0)])
        taken[k, m] = np.maximum(sent[k, m], slot) + link[k]
    return Simulation(start, sent, end, taken, forward + backward)
