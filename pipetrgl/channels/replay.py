"""The replay log: what a sender keeps so that a receiver which was replaced can go on from its own checkpoint.

sent:   ... 17 18 19 | 20 21 22 23 24 ▶ receiver          kept: 20 .. 24, at most `max_bytes`
                     └ the receiver's newest durable checkpoint covers 0 .. 19
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from pipetrgl.errors import LinkError, ReplayGapError
from pipetrgl.microbatch import MicroBatch


@final
@dataclass(frozen=True)
class Sent:
    """A micro-batch as it leaves a stage, or the end of the stream; holds its tensors alive, without a copy.

    Attributes:
        index: of the micro-batch; the end of the stream counts as one more.
        labelled: the micro-batch without what travels as payload; None: the end of the stream.
        parts: payload tensors.
        has_image: the last of them are the image's.
        versions: of `parts` when they were handed over, to notice a change in place.
    """

    index: int
    labelled: MicroBatch | None
    parts: tuple[Tensor, ...] = ()
    has_image: bool = False
    versions: tuple[int, ...] = ()

    @staticmethod
    def now(micro_batch: MicroBatch, parts: tuple[Tensor, ...]) -> Sent:
        """With the versions that `parts`, its encoded tensors, have at this moment."""
        has_image, versions = micro_batch.image is not None, tuple(part._version for part in parts)
        return Sent(micro_batch.index, micro_batch.as_tick(), parts, has_image, versions)

    @property
    def payload_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Of all that it holds alive."""
        labels = () if self.labelled is None else (self.labelled.target, self.labelled.positions)
        return self.payload_bytes + sum(tensor.nbytes for tensor in labels)

    def require_unchanged(self, receiver: str) -> None:
        """Raises:
        LinkError: a payload tensor was changed in place since it was handed over.
        """
        if tuple(part._version for part in self.parts) != self.versions:
            assert self.labelled is not None, "the end of the stream has no parts"
            raise LinkError(
                f"step {self.labelled.step}: the activation for {receiver} was changed in place while it "
                "was being sent; the stage's backward pass or a hook must not modify its output"
            )


@final
class ReplayLog:
    """The newest consecutive micro-batches that fit into `max_bytes`; 0 keeps nothing.

    Args:
        max_bytes: labels and payload.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: deque[Sent] = deque()
        self._next: int | None = None  # index after the newest that was ever added
        self.num_bytes = 0

    def add(self, sent: Sent) -> None:
        """Keep `sent`, which follows the one before; the oldest are let go where there is no room."""
        self._next = sent.index + 1
        if self._max_bytes == 0:
            return
        self._kept.append(sent)
        self.num_bytes += sent.num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop_oldest()

    def trim(self, index: int) -> None:
        """The receiver will never ask for less than `index`."""
        while self._kept and self._kept[0].index < index:
            self._drop_oldest()

    def since(self, index: int, receiver: str) -> Sequence[Sent]:
        """Everything from micro-batch `index` on.

        Raises:
            ReplayGapError: some of it is no longer kept.
        """
        first = self._kept[0].index if self._kept else self._next
        if first is not None and index < first:
            raise ReplayGapError(
                f"{receiver} needs micro-batch {index} again, but only {first} and later are kept: "
                "raise channel.log_bytes, or save more often (checkpoint.every)"
            )
        return [sent for sent in self._kept if sent.index >= index]

    def _drop_oldest(self) -> None:
        self.num_bytes -= self._kept.popleft().num_bytes
