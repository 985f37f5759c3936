"""What a bench says in numbers: medians and quartiles, ratios within a round, rows of the CSV, the result."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from pipetrgl.config.bench import SCHEDULES, Point
from pipetrgl.studies.measurement import Measurement
from pipetrgl.studies.prediction import Prediction

RESULT_SCHEMA = 1
ON_ALL_WORKERS = ("pipetrgl", "independent", "ddp", *SCHEDULES)
"""Contenders that have an efficiency."""
COLUMNS = (
    "point", "strong", "weak", "workers", "batch", "capacity", "codec", "cuts", "contender", "round", "rows", "batches",
    "seconds", "images_per_s", "cpu_s", "sent_bytes", "wait_share_by_worker", "cpu_s_by_worker", "sent_bytes_by_worker",
    "peak_rss_bytes_by_worker", "error",
)  # fmt: skip
"""Of measurements.csv; cells by worker are JSON lists."""


@final
@dataclass(frozen=True)
class Outcome:
    """A point and what was measured at it.

    Attributes:
        number: of the point, from 0.
        cuts: counted blocks of each stage.
        config_hash: of its config, cuts included.
    """

    number: int
    point: Point
    cuts: tuple[int, ...]
    config_hash: str
    prediction: Prediction
    measurements: tuple[Measurement, ...]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles, these by linear interpolation between the sorted values; None without any.

    >>> spread([1.0, 2.0, 4.0])
    {'median': 2.0, 'low': 1.5, 'high': 3.0}
    """
    if not values:
        return None
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median, "low": low, "high": high}


def ratios(measurements: Sequence[Measurement], above: str, below: str) -> list[float]:
    """images/s of one contender over those of another, in each round that both got through."""
    rates = {(one.contender, one.round): one.images_per_s for one in measurements if one.error is None}
    rounds = sorted(number for name, number in rates if name == above and (below, number) in rates)
    return [rates[above, number] / rates[below, number] for number in rounds]


def over_slowest_stage(measurements: Sequence[Measurement]) -> list[float]:
    """images/s of the pipeline over those of its slowest stage alone, in each round that all got through."""
    names = {one.contender for one in measurements if one.contender.startswith("stage ")}
    each = [ratios(measurements, "pipetrgl", name) for name in names]
    return [max(column) for column in zip(*each, strict=True)] if len({len(one) for one in each}) == 1 else []


def csv_row(outcome: Outcome, taken: Measurement) -> dict[str, Any]:
    """Under COLUMNS; a measurement that failed has no numbers."""
    point = outcome.point
    row: dict[str, Any] = {
        "point": outcome.number,
        "strong": json.dumps(point.strong),
        "weak": json.dumps(point.weak),
        "workers": point.workers,
        "batch": point.batch,
        "capacity": point.capacity,
        "codec": point.codec,
        "cuts": " ".join(map(str, outcome.cuts)),
        "contender": taken.contender,
        "round": taken.round,
        "error": taken.error or "",
    }
    if taken.error is None:
        row |= {
            "rows": taken.rows,
            "batches": taken.batches,
            "seconds": taken.seconds,
            "images_per_s": taken.images_per_s,
            "cpu_s": sum(taken.cpu_s),
            "sent_bytes": sum(taken.sent_bytes),
            "wait_share_by_worker": json.dumps(taken.wait_share),
            "cpu_s_by_worker": json.dumps(taken.cpu_s),
            "sent_bytes_by_worker": json.dumps(taken.sent_bytes),
            "peak_rss_bytes_by_worker": json.dumps(taken.peak_rss_bytes),
        }
    return row


def point_result(outcome: Outcome) -> dict[str, Any]:
    """A point of result.json, docs/run-folder.md."""
    point, taken = outcome.point, outcome.measurements
    names = dict.fromkeys(one.contender for one in taken)
    kinds = list(point.contenders)
    return {
        "point": outcome.number,
        "strong": point.strong,
        "weak": point.weak,
        "workers": point.workers,
        "batch": point.batch,
        "capacity": point.capacity,
        "codec": point.codec,
        "cuts": list(outcome.cuts),
        "threads": point.config.train.threads,
        "config_hash": outcome.config_hash,
        "profile_cpu_share": outcome.prediction.cpu_share,
        "over_slowest_stage": spread(over_slowest_stage(taken)),
        "peak_rss_bytes": _by_worker(max, [one.peak_rss_bytes for one in taken]),
        # turns change their order from round to round; the table keeps that of the file
        "contenders": [
            _contender(outcome, name)
            for name in sorted(names, key=lambda one: (kinds.index(kind_of(one)), len(one), one))
        ],
    }


def kind_of(contender: str) -> str:
    """As a bench file writes it, but stages by number.

    >>> kind_of("gpipe/M4"), kind_of("end_to_end/threads2")
    ('gpipe', 'end_to_end/threads2')
    """
    kind, mark, count = contender.rpartition("/M")
    return kind if mark and count.isdecimal() else contender


def _contender(outcome: Outcome, name: str) -> dict[str, Any]:
    everything = outcome.measurements
    mine = [one for one in everything if one.contender == name]
    good = [one for one in mine if one.error is None]
    speed_up = spread(ratios(everything, name, "serial"))
    rate = spread([one.images_per_s for one in good])
    predicted = outcome.prediction.of(name)
    return {
        "contender": name,
        "rounds": len(good),
        "images_per_s": rate,
        "speed_up": speed_up,
        "efficiency": speed_up["median"] / outcome.point.workers
        if speed_up and kind_of(name) in ON_ALL_WORKERS
        else None,
        "pipetrgl_over": spread(ratios(everything, "pipetrgl", name)),
        "predicted_images_per_s": predicted,
        "measured_over_predicted": None if rate is None or predicted is None else rate["median"] / predicted,
        "wait_share": _by_worker(statistics.median, [one.wait_share for one in good]),
        "cpu_s_per_batch": _by_worker(statistics.median, [_each(one.cpu_s, one.batches) for one in good]),
        "sent_bytes_per_batch": _by_worker(statistics.median, [_each(one.sent_bytes, one.batches) for one in good]),
        "trace": None,
        "error": next((one.error for one in mine if one.error is not None), None),
    }


def _each(values: Sequence[float], batches: int) -> list[float]:
    return [value / batches for value in values]


def _by_worker(what: Callable[[list[float]], float], rounds: Sequence[Sequence[float | None]]) -> list[float | None]:
    """One value a worker, from those of every round; None where no round knows it."""
    known = [[value for value in column if value is not None] for column in itertools.zip_longest(*rounds)]
    return [what(values) if values else None for values in known]
