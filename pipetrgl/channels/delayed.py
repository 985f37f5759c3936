"""A slow link for tests: an inbox whose micro-batches reach the stage some time after they arrived.

wrapped inbox ─▶ thread: copy, note when it is due ─▶ cable (first in, first out) ─▶ stage: takes it when it is due

Delays overlap, as on a long cable: they cost the first micro-batch's time, not every micro-batch's.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import final

import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.contracts import Inbox
from pipetrgl.channels.mailbox import Mailbox
from pipetrgl.channels.threads import copied
from pipetrgl.microbatch import MicroBatch

CABLE = 64
"""Micro-batches that fit on the cable: at 100 ms, 640 a second pass."""

_LOOK_S = 0.05


@final
class DelayedInbox:
    """Hands out each micro-batch no earlier than delay_s + u * jitter_s after it arrived, u uniform in [0, 1).

    Holds up to `cable` copies on top of what the wrapped inbox holds, for that one's slots are used again at once.

    Args:
        inbox: wrapped; keeps its own deadline.
        delay_s, jitter_s: of every micro-batch.
        stream: of the jitter.
        alarm: of the worker.
        cable: micro-batches on their way, the one in the stage's hands included.
    """

    def __init__(
        self, inbox: Inbox, delay_s: float, jitter_s: float, stream: torch.Generator, alarm: Alarm, cable: int = CABLE
    ) -> None:
        self._inbox = inbox
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._stream = stream
        self._alarm = alarm
        # no deadlines of its own: the wrapped inbox has one for a silent sender, the sender one for a silent stage
        self._box = Mailbox(cable, alarm, math.inf, "the cable", "the stage")
        self._due: deque[float] = deque()
        self._on_the_way_s = 0.0
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._thread.start()

    @property
    def waited_s(self) -> float:
        return self._box.consumer_waited_s + self._on_the_way_s

    @property
    def is_late(self) -> bool:
        if self._box.is_late:
            return True
        return bool(self._due) and self._due[0] > time.monotonic() and not self._alarm.rang

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro_batch in self._box:
            self._wait_until(self._due.popleft())
            yield micro_batch
            del micro_batch  # nothing here may keep its tensor
        self._alarm.check()

    def close(self) -> None:
        self._box.wake()
        self._inbox.close()
        if not self._alarm.rang:  # else it may hang in a broken link; it is a daemon, and nobody waits for it
            self._thread.join(timeout=5.0)

    def _carry(self) -> None:
        try:
            for micro_batch in self._inbox:
                due = time.monotonic() + self._delay_s + self._jitter_s * self._uniform()
                self._box.acquire()
                self._due.append(due)
                self._box.put(copied(micro_batch))
                del micro_batch  # nor may a frame that waits for the next one
            self._box.end()
        except BaseException as error:
            self._alarm.ring(error)
        finally:
            self._box.wake()

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self._stream))

    def _wait_until(self, due: float) -> None:
        start = time.monotonic()
        while (left := due - time.monotonic()) > 0:
            self._alarm.check()
            time.sleep(min(left, _LOOK_S))
        self._on_the_way_s += time.monotonic() - start
