"""What every channel promises: an inbox gives micro-batches in order, an outbox takes them and does not wait.

    stage k: outbox ──── at most `capacity` micro-batches, first in first out ────▶ inbox: stage k + 1

A micro-batch taken from an inbox may be read until the next one is taken: its slot is then used again. The receiver can
never alter the sender's tensor. Waits end with an error when the alarm rings or a deadline passes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol, final, runtime_checkable

from torch import Tensor

from pipetrgl.microbatch import MicroBatch


class Inbox(Protocol):
    """Where a stage takes its micro-batches from: the previous stage, or the data loader."""

    @property
    def waited_s(self) -> float:
        """Total time that the consumer was blocked."""

    def __iter__(self) -> Iterator[MicroBatch]:
        """Micro-batches in order until the sender closes; raises the run's error if there is one."""

    def close(self) -> None:
        """Let go of threads and memory; safe to call twice."""


class Outbox(Protocol):
    """Where a stage puts what it hands on."""

    @property
    def waited_s(self) -> float:
        """Total time that the producer was blocked because the receiver was behind."""

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed over, headers not counted."""

    @property
    def received_index(self) -> int:
        """The newest micro-batch that the receiver is known to hold, and with it all before; it may hold more."""

    def send(self, micro_batch: MicroBatch) -> None:
        """Hand over; blocks only while the receiver is `capacity` behind. The activation must not be changed after."""

    def close(self) -> None:
        """End the stream and wait until everything is delivered."""


class Sum(Protocol):
    """A sum over a replica group that is under way."""

    def wait(self) -> None:
        """Return when the tensor is the sum; raises the run's error if there is one."""


class ReplicaGroup(Protocol):
    """The workers that hold the same stage. All of them ask for the same sums in the same order."""

    @property
    def replica(self) -> int:
        """This worker's number among them."""

    @property
    def num_replicas(self) -> int: ...

    def start_sum(self, tensor: Tensor) -> Sum:
        """Begin to replace a tensor by its sum over the group, the same bits on every replica; in place."""


@runtime_checkable
class WatchedInbox(Inbox, Protocol):
    """An inbox that can say whether its next micro-batch is late."""

    @property
    def is_late(self) -> bool:
        """Whether the consumer would be blocked now; False at the end of the stream, and once the alarm has rung."""


@final
class NullOutbox:
    """The last stage's outbox."""

    waited_s = 0.0
    sent_bytes = 0
    received_index = sys.maxsize

    def send(self, micro_batch: MicroBatch) -> None:
        pass

    def close(self) -> None:
        pass


@final
class OneReplica:
    """A lone replica's group: every sum has one term."""

    replica = 0
    num_replicas = 1

    def start_sum(self, tensor: Tensor) -> Sum:
        return self

    def wait(self) -> None:
        pass
