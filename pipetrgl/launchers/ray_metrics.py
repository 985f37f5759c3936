"""A run's metrics in Ray's own: gauges that its dashboard and Prometheus show."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from pipetrgl.engine.metrics import Row, Sink

_GAUGES = {
    "step": "Optimizer steps that the stage has reported.",
    "local_loss": "Mean local loss since the last row.",
    "task_loss": "Mean cross-entropy since the last row.",
    "transport_cost": "Mean transport cost since the last row, not weighted.",
    "accuracy": "Of the stage's head on training rows.",
    "images_per_s": "Training images per second of the stage.",
    "wait_share": "Share of the time that the stage waited for input or to send.",
}
_TAGS = ("run", "stage")


def gauged(sink: Sink, run: str) -> Sink:
    """A sink that also shows train rows as `pipetrgl_<name>` and counts replaced stages.

    Args:
        sink: takes every row as it is.
        run: tag of every gauge.
    """
    gauges = {name: Gauge(f"pipetrgl_{name}", description=text, tag_keys=_TAGS) for name, text in _GAUGES.items()}
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
