"""Means with their intervals: Student's t, from its distribution for whole degrees of freedom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """mean -+ t * s / sqrt(n), s the standard deviation of n values.

    Attributes:
        half: half its width; None for a single value, which says nothing of its own spread.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    @property
    def holds_zero(self) -> bool | None:
        return None if self.half is None else abs(self.mean) <= self.half


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The interval of the mean of independent values: of each seed's difference, for a paired comparison."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    half = t_quantile(level, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def t_quantile(level: float, freedom: int) -> float:
    """t such that a value of Student's distribution lies between -t and t with probability `level`.

    Bisection over the angle theta = atan(t / sqrt(freedom)), in which the probability rises from 0 to 1.

    Args:
        level: between 0 and 1, both excluded.
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _between(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _between(theta: float, freedom: int) -> float:
    """Probability between -t and t: a finite sum for whole degrees of freedom.

    odd:  2/pi (theta + sin theta (cos theta + 2/3 cos^3 theta + 2*4/(3*5) cos^5 theta + ..)), to cos^(freedom-2)
    even: sin theta (1 + 1/2 cos^2 theta + 1*3/(2*4) cos^4 theta + ..), to cos^(freedom-2)

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    odd, cosine = freedom % 2, math.cos(theta)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
