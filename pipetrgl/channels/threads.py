"""A channel between two threads of one process: a mailbox that copies what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import Codec, received
from pipetrgl.channels.mailbox import Mailbox
from pipetrgl.microbatch import MicroBatch


@final
class ThreadOutbox:
    """The sending side; copies, so that an in-place operation of the receiver cannot reach the sender's tensor."""

    def __init__(self, box: Mailbox, codec: Codec) -> None:
        self._box = box
        self._codec = codec
        self.sent_bytes = 0
        self.received_index = -1

    @property
    def waited_s(self) -> float:
        return self._box.producer_waited_s

    def send(self, micro_batch: MicroBatch) -> None:
        self._box.acquire()
        copy = copied(received(self._codec, micro_batch))
        self.sent_bytes += sum(tensor.nbytes for tensor in copy.tensors)
        self._box.put(copy)
        self.received_index = micro_batch.index

    def close(self) -> None:
        self._box.end()


@final
class ThreadInbox:
    """The receiving side."""

    def __init__(self, box: Mailbox) -> None:
        self._box = box

    @property
    def waited_s(self) -> float:
        return self._box.consumer_waited_s

    @property
    def is_late(self) -> bool:
        return self._box.is_late

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._box)

    def close(self) -> None:
        self._box.wake()


def thread_link(
    capacity: int, codec: Codec, alarm: Alarm, timeout_s: float, sender: str = "sender", receiver: str = "receiver"
) -> tuple[ThreadOutbox, ThreadInbox]:
    """Both sides of one channel.

    Args:
        capacity: micro-batches between the two, the one that the receiver works on included.
        codec: applied on the way.
        alarm: shared by all threads of the run.
        timeout_s: longest wait for the other side.
    """
    box = Mailbox(capacity, alarm, timeout_s, sender, receiver)
    return ThreadOutbox(box, codec), ThreadInbox(box)


def copied(micro_batch: MicroBatch) -> MicroBatch:
    """The same micro-batch, with activation and image in memory of their own."""
    activation, image = micro_batch.activation, micro_batch.image
    if isinstance(activation, tuple):
        copy = micro_batch.carrying(tuple(tensor.clone() for tensor in activation))
    else:
        copy = micro_batch.carrying(activation.clone())
    return copy if image is None else copy.beside(image.clone())
