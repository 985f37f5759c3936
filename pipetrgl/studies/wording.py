"""How reports write a number, a share, a rate, a size or a time; what is absent is an en dash."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "\N{EN DASH}"


def block_range(blocks: Sequence[str]) -> str:
    """First and last block of a stage: "layer1.0 .. layer1.3"."""
    if not blocks:
        return ABSENT
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} .. {blocks[-1]}"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """Three significant digits; NaN and infinity are values, only None is absent."""
    if value is None:
        return ABSENT
    return f"{value:#.3g}" if math.isfinite(value) and value != 0 else f"{value:g}"


def rate(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Decimal units, as in every size of this project."""
    if value is None:
        return ABSENT
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
