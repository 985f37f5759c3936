"""The replaying inbox: what a stage learns from while the stage before it is late, in the replay order.

size 2, max_reuse 2     time ─▶
arrives                 a  b        c  d
ring                    a  ab       bc cd            the newest `size` that arrived
stage takes             a  b  b' a' c  d  d' c'      ' reused: the least used, the newest among them; then it waits

Not the replay log (replay.py), which sends again what a replaced stage lacks.
Source: Belilovsky, Eickenberg, Oyallon, arXiv 1901.08164, algorithm 2; what differs is in docs/method.md.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from pipetrgl.channels.contracts import WatchedInbox
from pipetrgl.channels.threads import copied
from pipetrgl.microbatch import MicroBatch, Split


@final
class ReplayingInbox:
    """Hands out what arrives, and where it would wait for that, what has arrived before, marked as reused.

    Nothing is reused within an evaluation, which so scores one set of weights, nor after the last training micro-batch,
    whose weights are those that are saved.

    Args:
        inbox: wrapped; with two slots or more, for one is held until the next micro-batch is taken.
        size: of the ring, in micro-batches; copies, for the wrapped inbox uses its slots again.
        max_reuse: uses of one micro-batch, the first included: 1 reuses nothing.
    """

    def __init__(self, inbox: WatchedInbox, size: int, max_reuse: int) -> None:
        self._inbox = inbox
        self._max_reuse = max_reuse
        self._ring: deque[_Kept] = deque(maxlen=size)

    @property
    def waited_s(self) -> float:
        return self._inbox.waited_s

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro_batch in self._inbox:
            self._keep(micro_batch)
            may_reuse = micro_batch.split is Split.TRAIN or micro_batch.closes_split
            yield micro_batch
            del micro_batch  # nothing here may keep its tensor
            while may_reuse and self._inbox.is_late and (again := self._reuse()) is not None:
                yield again
                del again

    def close(self) -> None:
        self._inbox.close()

    def _keep(self, micro_batch: MicroBatch) -> None:
        if micro_batch.closes_phase:
            self._ring.clear()
        elif micro_batch.split is Split.TRAIN:
            self._ring.append(_Kept(dataclasses.replace(copied(micro_batch), reused=True)))

    def _reuse(self) -> MicroBatch | None:
        """The newest of those with the fewest uses; None where all are used up."""
        kept = min(reversed(self._ring), key=lambda one: one.uses, default=None)
        if kept is None or kept.uses == self._max_reuse:
            return None
        kept.uses += 1
        # a copy again: the stage may change what it is given
        return copied(kept.micro_batch)


@dataclass
class _Kept:
    """A micro-batch in the ring."""

    micro_batch: MicroBatch
    uses: int = 1
