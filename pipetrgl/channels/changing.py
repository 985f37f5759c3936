"""The changing outbox: sends something else than the loop gives it, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from pipetrgl.channels.contracts import Outbox
from pipetrgl.microbatch import MicroBatch


@final
class ChangingOutbox:
    """An outbox that sends what becomes of a micro-batch.

    Args:
        outbox: wrapped.
        change: what to send in place of a micro-batch; None: nothing.
    """

    def __init__(self, outbox: Outbox, change: Callable[[MicroBatch], MicroBatch | None]) -> None:
        self._outbox = outbox
        self._change = change

    @property
    def waited_s(self) -> float:
        return self._outbox.waited_s

    @property
    def sent_bytes(self) -> int:
        return self._outbox.sent_bytes

    @property
    def received_index(self) -> int:
        return self._outbox.received_index

    def send(self, micro_batch: MicroBatch) -> None:
        changed = self._change(micro_batch)
        if changed is not None:
            self._outbox.send(changed)

    def close(self) -> None:
        self._outbox.close()
