"""The threads launcher: one thread a stage in this process, for debugging and tests."""

from __future__ import annotations

import threading

import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.channels.threads import thread_link
from pipetrgl.engine.metrics import Sink
from pipetrgl.engine.pulse import Pulse
from pipetrgl.errors import Interrupted
from pipetrgl.launchers.supervise import Budget
from pipetrgl.worker import Job, run_worker


class ThreadLinks:
    """All channels of a run; stage k sends on the k-th and receives on the one before."""

    clock_offset_s = 0.0

    def __init__(self, job: Job, alarm: Alarm) -> None:
        channel = job.blueprint.config.channel
        self._links = [
            thread_link(
                channel.capacity,
                CODECS[channel.codec],
                alarm,
                channel.wait_timeout_s,
                f"stage {stage}",
                f"stage {stage + 1}",
            )
            for stage in range(job.blueprint.num_stages - 1)
        ]

    def inbox(self, stage: int) -> Inbox:
        return self._links[stage - 1][1]

    def outbox(self, stage: int) -> Outbox:
        return self._links[stage][0]


def launch(job: Job, sink: Sink, budget: Budget) -> None:
    """Train; raises the first error of any stage, after all threads have ended."""
    alarm = Alarm()
    links = ThreadLinks(job, alarm)
    lock = threading.Lock()
    device = torch.device(job.blueprint.config.pipeline.hardware)

    def locked_sink(row: dict[str, object]) -> None:
        with lock:
            sink(row)

    def work(stage: int) -> None:
        try:
            run_worker(job, job.blueprint.world.place(stage), links, locked_sink, device, alarm, Pulse())
        except BaseException as error:
            alarm.ring(error)

    threads = [
        threading.Thread(target=work, args=(stage,), name=f"stage {stage}", daemon=True)
        for stage in range(job.blueprint.num_stages)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except (KeyboardInterrupt, Interrupted) as interrupt:
        alarm.ring(interrupt)
        for thread in threads:
            thread.join()
    alarm.check()
