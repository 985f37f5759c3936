"""The worker of end-to-end training over several: one stage in torch's schedule, with the loop and hooks of any run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.contracts import ReplicaGroup
from pipetrgl.channels.replicas import Agreed
from pipetrgl.data.loader import Loader
from pipetrgl.engine import loop
from pipetrgl.engine.end_to_end import Chain
from pipetrgl.engine.metrics import Sink
from pipetrgl.engine.pulse import Pulse
from pipetrgl.engine.schedules import Scheduled, Sent, Steps, Worked
from pipetrgl.engine.trace import TraceHook
from pipetrgl.memory import peak_rss_bytes
from pipetrgl.worker import Job, build_hooks, build_plan, build_stage, build_trace, configure_torch
from pipetrgl.world import Place

_POLL_S = 0.1


class Links(Protocol):
    """How one worker reaches all others."""

    def pipeline(self, place: Place) -> tuple[ProcessGroup, ReplicaGroup]:
        """The group in which torch's schedules send, and one for sums over the stages."""

    @property
    def clock_offset_s(self) -> float: ...


def run_scheduled(
    job: Job, place: Place, links: Links, sink: Sink, device: torch.device, alarm: Alarm, pulse: Pulse
) -> None:
    """Train one stage from the first step to the last; arguments and errors are those of `worker.run_worker`.

    Every worker goes through the same steps. The first one reads their images, the others the targets alone.
    """
    blueprint = job.blueprint
    config, who = blueprint.config, {"stage": place.stage, "replica": place.replica}
    configure_torch(config.train)
    stage = build_stage(blueprint, place.stage, device)
    group, stages = links.pipeline(place)
    sink({"kind": "linked", **who})
    spans = build_trace(blueprint, place, links.clock_offset_s)
    shapes, dtype = blueprint.shapes_of(place.stage), blueprint.input_dtype(place.stage)
    trainee = Scheduled(Chain(stage), blueprint.num_stages, shapes, dtype, config.train, group, Worked(pulse, spans))
    loader = Loader(
        job.dataset(), blueprint.itinerary, config.data, config.seed, job.first_step, Agreed(job.stop, stages),
        images=place.stage == 0,
    )  # fmt: skip
    inbox, outbox = Steps(loader, trainee), Sent(trainee)
    hooks = [*build_hooks(job, stage, inbox, outbox, sink), TraceHook(spans, place.stage, sink)]
    try:
        _until_alarm(alarm, lambda: loop.run(trainee, inbox, outbox, build_plan(job), hooks))
        sink({"kind": "memory", **who, "peak_rss_bytes": peak_rss_bytes()})
    except BaseException as error:
        alarm.ring(error)
        loader.close()
        raise


def _until_alarm(alarm: Alarm, work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, for nothing interrupts the waits of torch's schedules: the alarm leaves it."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="schedule", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        alarm.check()
    if failures:
        raise failures[0]
