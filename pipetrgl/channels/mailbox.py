"""A bounded first-in-first-out box with credits: what stands between a receiver's thread, or a sender, and a stage."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import final

from pipetrgl.channels.alarm import Alarm, wait_until
from pipetrgl.microbatch import MicroBatch


@final
class Mailbox:
    """Holds at most `capacity` micro-batches, the one in the consumer's hands included.

    producer: acquire ─▶ put ─▶ ... ─▶ end          consumer: for micro_batch in box (a slot is released at the next)

    Args:
        capacity: slots.
        alarm: ends every wait.
        timeout_s: the longest wait.
        producer, consumer: names for messages, "stage 1 (rank 1)".
    """

    def __init__(self, capacity: int, alarm: Alarm, timeout_s: float, producer: str, consumer: str) -> None:
        self.capacity = capacity
        self.alarm = alarm
        self.timeout_s = timeout_s
        self.producer = producer
        self.consumer = consumer
        self.consumer_waited_s = 0.0
        self.producer_waited_s = 0.0
        self._ready: deque[MicroBatch] = deque()
        self._used = 0
        self._ended = False
        self._condition = threading.Condition()

    def acquire(self) -> None:
        """Wait for a free slot and take it."""
        with self._condition:
            self.producer_waited_s += wait_until(
                self._condition,
                lambda: self._used < self.capacity,
                self.alarm,
                self.timeout_s,
                f"{self.consumer} to free a slot",
            )
            self._used += 1

    def put(self, micro_batch: MicroBatch) -> None:
        """Fill the slot that was acquired."""
        with self._condition:
            self._ready.append(micro_batch)
            self._condition.notify_all()

    def end(self) -> None:
        """No more micro-batches will come."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def wake(self) -> None:
        """Make both sides look at the alarm now."""
        with self._condition:
            self._condition.notify_all()

    @property
    def is_late(self) -> bool:
        """Whether the consumer would have to wait; without waiting."""
        with self._condition:
            return not (self._ready or self._ended or self.alarm.rang)

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            with self._condition:
                self.consumer_waited_s += wait_until(
                    self._condition,
                    lambda: bool(self._ready) or self._ended,
                    self.alarm,
                    self.timeout_s,
                    f"a micro-batch from {self.producer}",
                )
                if not self._ready:
                    return
                micro_batch = self._ready.popleft()
            yield micro_batch
            del micro_batch  # the slot is free for the next one: nothing here may keep its tensor
            with self._condition:
                self._used -= 1
                self._condition.notify_all()
