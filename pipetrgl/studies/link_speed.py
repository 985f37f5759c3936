"""Measures a link of this machine: a real outbox and inbox over gloo and loopback, between two threads.

    time of one micro-batch = latency + bytes / bandwidth, from streams of small and of large ones that nothing slows

Two threads, for only launchers create processes. What they share is Python's lock, which the few calls of sender and
receiver for each micro-batch compete for: the latency errs on the slow side. The bytes take the same way as between
processes, in gloo's own threads, through the kernel's loopback.
"""

from __future__ import annotations

import threading
import time

import torch
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import RECEIVER, SENDER, HashStore, gloo_pair
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.inbox import LinkInbox
from pipetrgl.channels.link import Connection, Irreplaceable, LinkTerms
from pipetrgl.channels.outbox import LinkOutbox
from pipetrgl.channels.payload import GlooLine
from pipetrgl.channels.replay import ReplayLog
from pipetrgl.errors import LaunchError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.studies.costs import LinkSpeed

_SMALL_BYTES, _LARGE_BYTES = 4 * 2**10, 32 * 2**20
_NUM_SMALL, _NUM_LARGE = 50, 12
_TIMEOUT_S = 60.0
_PATIENCE = 10  # times as many streams at the most, where the first ones were disturbed


def measure_link(repeats: int, capacity: int) -> LinkSpeed:
    """Latency and bandwidth of a link that does nothing else, from the fastest of `repeats` streams of each size.

    The fastest and not the median: what else runs on the machine only slows a stream, and small ones most.

    Raises:
        LaunchError: so much else runs that large micro-batches seem as fast as small ones.
    """
    small, large = float("inf"), float("inf")
    for taken in range(1, _PATIENCE * repeats + 1):
        small = min(small, _stream_s(_SMALL_BYTES, _NUM_SMALL, capacity))
        large = min(large, _stream_s(_LARGE_BYTES, _NUM_LARGE, capacity))
        if taken >= repeats and large > small:
            break
    return fit(_SMALL_BYTES, small, _LARGE_BYTES, large)


def fit(small_bytes: int, small_s: float, large_bytes: int, large_s: float) -> LinkSpeed:
    """The line through two measurements.

    >>> fit(0, 1.0, 100, 3.0)
    LinkSpeed(latency_s=1.0, bytes_per_s=50.0)

    Raises:
        LaunchError: it does not rise.
    """
    if large_s <= small_s:
        raise LaunchError(
            f"this machine is too busy to measure a link: {small_bytes:,} bytes took {1e3 * small_s:.2f} ms, and "
            f"{large_bytes:,} took {1e3 * large_s:.2f} ms; try again when less runs"
        )
    bytes_per_s = (large_bytes - small_bytes) / (large_s - small_s)
    return LinkSpeed(max(0.0, small_s - small_bytes / bytes_per_s), bytes_per_s)


def _stream_s(num_bytes: int, count: int, capacity: int) -> float:
    """Seconds between two micro-batches of a stream, as the receiver sees it."""
    alarm, (sender, receiver) = Alarm(), _pair()
    terms = LinkTerms(1, capacity, CODECS["fp32"], 2, _TIMEOUT_S, "the sender", "the receiver")
    inbox = LinkInbox(receiver, terms, alarm, Irreplaceable(), (), torch.device("cpu"))
    outbox = LinkOutbox(sender, terms, alarm, Irreplaceable(), ReplayLog(0))
    activation, label = torch.zeros(1, num_bytes // 4), torch.zeros(1, dtype=torch.int64)

    def send() -> None:
        try:
            for index in range(count):
                outbox.send(MicroBatch(activation, label, label, Split.TRAIN, 0, index, index, 0, 1, True, False))
            outbox.close()
        except BaseException as error:
            alarm.ring(error)

    thread = threading.Thread(target=send, name="the sender", daemon=True)
    thread.start()
    try:
        arrivals = [time.perf_counter() for _ in inbox]
        thread.join()
    finally:
        outbox.let_go()
        inbox.close()
    # the first `capacity` fill the slots while the connection warms up
    return (arrivals[-1] - arrivals[capacity]) / (count - 1 - capacity)


def _pair() -> tuple[Connection, Connection]:
    store = HashStore()
    groups: dict[int, ProcessGroup] = {}

    def build(side: int) -> None:
        groups[side] = gloo_pair(store, side, "127.0.0.1", _TIMEOUT_S)

    thread = threading.Thread(target=build, args=(RECEIVER,))
    thread.start()
    build(SENDER)
    thread.join()
    return tuple(Connection(groups[side], GlooLine(groups[side], 1 - side), 0) for side in (SENDER, RECEIVER))  # type: ignore[return-value]
