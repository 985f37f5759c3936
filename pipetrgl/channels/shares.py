"""Between stages with different numbers of replicas: micro-batches are split by rows on one side, joined on the other.

stage 1, 2 replicas    rows 0 .. 3 ──▶ stage 2, replica 0    rows 0 1
                                  └──▶ replica 1             rows 2 3 4
                       rows 4 .. 7 ──▶┘
                                  └──▶ replica 2             rows 5 6 7

Every piece is one link's; one that is empty still travels as a header, so that indices stay consecutive on every link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

from pipetrgl.channels.contracts import Inbox, NullOutbox, Outbox
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, joined


def join(inboxes: Sequence[Inbox]) -> Inbox:
    """One inbox out of one or several, in the order of their rows."""
    return inboxes[0] if len(inboxes) == 1 else JoinedInbox(inboxes)


def split(outboxes: Sequence[Outbox], shares: Sequence[Callable[[range], range]]) -> Outbox:
    """One outbox out of none, one or several, each of which takes its receiver's rows; see `SplitOutbox`."""
    if not outboxes:
        return NullOutbox()
    return outboxes[0] if len(outboxes) == 1 else SplitOutbox(outboxes, shares)


@final
class JoinedInbox:
    """One inbox out of several, which carry neighbouring rows of the same stream; copies the activations.

    Args:
        inboxes: in the order of their rows, two or more.
    """

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self._inboxes = tuple(inboxes)

    @property
    def waited_s(self) -> float:
        return sum(inbox.waited_s for inbox in self._inboxes)

    def __iter__(self) -> Iterator[MicroBatch]:
        streams = [iter(inbox) for inbox in self._inboxes]
        while True:
            shares = [share for share in (next(stream, None) for stream in streams) if share is not None]
            if not shares:
                return
            indices = {share.index for share in shares}
            if len(shares) < len(streams) or len(indices) > 1:
                raise LinkError(
                    f"stage replicas handed on {len(shares)} of {len(streams)} shares of micro-batch {min(indices)}: "
                    "they do not work on the same stream"
                )
            micro_batch = joined(shares)
            del shares
            yield micro_batch
            del micro_batch  # nothing here may keep its tensor while the next ones are awaited

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()


@final
class SplitOutbox:
    """One outbox out of several, each of which takes its receiver's rows; nothing is copied.

    Args:
        outboxes: in the order of their rows, two or more.
        shares: of each, the rows of a whole micro-batch that its receiver works on.
    """

    def __init__(self, outboxes: Sequence[Outbox], shares: Sequence[Callable[[range], range]]) -> None:
        self._outboxes = tuple(zip(outboxes, shares, strict=True))

    @property
    def waited_s(self) -> float:
        return sum(outbox.waited_s for outbox, _ in self._outboxes)

    @property
    def sent_bytes(self) -> int:
        return sum(outbox.sent_bytes for outbox, _ in self._outboxes)

    @property
    def received_index(self) -> int:
        return min(outbox.received_index for outbox, _ in self._outboxes)

    def send(self, micro_batch: MicroBatch) -> None:
        for outbox, share in self._outboxes:
            outbox.send(micro_batch.share(share(micro_batch.whole)))

    def close(self) -> None:
        for outbox, _ in self._outboxes:
            outbox.close()
