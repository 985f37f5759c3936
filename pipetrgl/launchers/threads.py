"""The threads launcher: one thread a worker in this process, for debugging and tests."""

from __future__ import annotations

import functools
import threading

import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.contracts import Inbox, OneReplica, Outbox, ReplicaGroup
from pipetrgl.channels.replicas import ThreadGroup
from pipetrgl.channels.shares import join, split
from pipetrgl.channels.threads import thread_link
from pipetrgl.engine.metrics import Sink
from pipetrgl.engine.pulse import Pulse
from pipetrgl.errors import Interrupted
from pipetrgl.launchers.membership import name_of
from pipetrgl.launchers.supervise import Budget
from pipetrgl.worker import Job, run_worker
from pipetrgl.world import Place


class ThreadLinks:
    """All channels and replica groups of a run."""

    clock_offset_s = 0.0

    def __init__(self, job: Job, alarm: Alarm) -> None:
        channel = job.blueprint.config.channel
        self._world = job.blueprint.world
        self._links = {
            (sender, receiver): thread_link(
                channel.capacity,
                CODECS[channel.codec],
                alarm,
                channel.wait_timeout_s,
                name_of(sender),
                name_of(receiver),
            )
            for sender in self._world.places
            for receiver in self._world.receivers(sender)
        }
        self._groups = [ThreadGroup(count, alarm, channel.wait_timeout_s) for count in self._world.replicas]

    def replicas(self, place: Place) -> ReplicaGroup:
        lone = self._world.replicas[place.stage] == 1
        return OneReplica() if lone else self._groups[place.stage].member(place.replica)

    def inbox(self, place: Place) -> Inbox:
        inboxes = [self._links[sender, place][1] for sender in self._world.senders(place)]
        return join(inboxes)

    def outbox(self, place: Place) -> Outbox:
        receivers = self._world.receivers(place)
        outboxes = [self._links[place, receiver][0] for receiver in receivers]
        shares = [functools.partial(self._world.share, receiver) for receiver in receivers]
        return split(outboxes, shares)


def launch(job: Job, sink: Sink, budget: Budget) -> None:
    """Train; raises the first error of any stage, after all threads have ended."""
    alarm = Alarm()
    links = ThreadLinks(job, alarm)
    lock = threading.Lock()
    device = torch.device(job.blueprint.config.pipeline.hardware)

    def locked_sink(row: dict[str, object]) -> None:
        with lock:
            sink(row)

    def work(place: Place) -> None:
        try:
            run_worker(job, place, links, locked_sink, device, alarm, Pulse())
        except BaseException as error:
            alarm.ring(error)

    threads = [
        threading.Thread(target=work, args=(place,), name=name_of(place), daemon=True)
        for place in job.blueprint.world.places
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
