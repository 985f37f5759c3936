"""A run's metrics in Ray's own: gauges that its dashboard and Prometheus show."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from pipetrgl.engine.metrics import NUMBERS, Row, Sink

_TAGS = ("run", "stage")


def gauged(sink: Sink, run: str) -> Sink:
    """A sink that also shows train rows as `pipetrgl_<name>` and counts replaced stages.

    Args:
        sink: takes every row as it is.
        run: tag of every gauge.
    """
    gauges = {name: Gauge(f"pipetrgl_{name}", description=text, tag_keys=_TAGS) for name, text in NUMBERS.items()}
    replaced = Counter("pipetrgl_replaced_stages", description="Stages that were replaced alone.", tag_keys=_TAGS)

    def take(row: Row) -> None:
        tags = {"run": run, "stage": str(row["stage"])}
        if row["kind"] == "train":
            for name, gauge in gauges.items():
                if row[name] is not None:
                    gauge.set(row[name], tags=tags)
        elif row["kind"] == "recovery" and row["what"] == "linked":
            replaced.inc(tags=tags)
        sink(row)

    return take
