"""The sending side of a link."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from pipetrgl.channels import wire
from pipetrgl.channels.alarm import Alarm, wait_until
from pipetrgl.channels.c10d import RECEIVER
from pipetrgl.channels.codecs import payload
from pipetrgl.channels.link import HEADER_TAG, LOOK_S, Connection, LinkTerms, LostPeerError, Neighbour, lost_if_broken
from pipetrgl.channels.replay import ReplayLog, Sent
from pipetrgl.errors import LinkError, ReplayGapError
from pipetrgl.microbatch import MicroBatch


@final
@dataclass(frozen=True)
class _Leaving:
    """A micro-batch that the stage has handed over, and what its payload has to wait for."""

    sent: Sent
    ready: Any


@final
class LinkOutbox:
    """One micro-batch may be on its way while the stage computes the next.

    Args:
        connection: opened.
        terms: of the link.
        alarm: ends every wait.
        neighbour: the receiver, should it be replaced.
        log: keeps what a replaced receiver would need again.
    """

    def __init__(
        self, connection: Connection, terms: LinkTerms, alarm: Alarm, neighbour: Neighbour, log: ReplayLog
    ) -> None:
        self._connection = connection
        self._terms = terms
        self._alarm = alarm
        self._neighbour = neighbour
        self._log = log
        self._writer = wire.Writer(terms.codec.code, terms.run_id, terms.label_words)
        self._condition = threading.Condition()
        self._leaving: _Leaving | None = None
        self._healing = False
        self._next: int | None = None  # index after the newest that was handed over
        self._ended = False
        self._let_go = False
        self.received_index = connection.next_index - 1
        self.waited_s = 0.0
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._see_off, name=f"to {terms.receiver}", daemon=True)
        self._thread.start()

    def send(self, micro_batch: MicroBatch) -> None:
        parts = tuple(part.contiguous() for part in payload(self._terms.codec, micro_batch))
        self._require_room(micro_batch.step, parts)
        self._hand_over(Sent.now(micro_batch, parts))

    def close(self) -> None:
        if self._ended:
            return
        self._ended = True
        index = self.received_index + 1 if self._next is None else self._next
        self._hand_over(Sent(index, labelled=None))
        with self._condition:
            self._wait_until_idle()

    def trim(self, index: int) -> None:
        """The receiver has made durable what came before micro-batch `index`."""
        with self._condition:
            self._log.trim(index)

    def let_go(self) -> None:
        """End the thread; the receiver will not be replaced any more."""
        with self._condition:
            self._let_go = True
            self._condition.notify_all()
        if not self._alarm.rang:  # a thread that hangs in a broken link is a daemon, and nobody waits for it
            self._thread.join(timeout=5.0)

    def _wait_until_idle(self) -> None:
        self.waited_s += wait_until(
            self._condition,
            lambda: self._leaving is None and not self._healing,
            self._alarm,
            self._terms.timeout_s,
            f"{self._terms.receiver} to take a micro-batch",
        )
        self._alarm.check()

    def _hand_over(self, sent: Sent) -> None:
        with self._condition:
            self._wait_until_idle()
            wanted = self._connection.next_index
            if self._next is None and sent.index > wanted:
                raise ReplayGapError(
                    f"{self._terms.receiver} wants micro-batch {wanted}, but this stream starts at {sent.index}"
                )
            self._next = sent.index + 1
            self._log.add(sent)
            if sent.index < wanted:
                return  # the worker that this one replaces has sent it already
            self.sent_bytes += sent.payload_bytes
            self._leaving = _Leaving(sent, self._connection.line.ready())
            self._condition.notify_all()

    def _require_room(self, step: int, parts: Sequence[Tensor]) -> None:
        sizes, rooms = [part.nbytes for part in parts], self._connection.rooms
        if any(size > room for size, room in zip(sizes, rooms, strict=False)):
            raise LinkError(
                f"step {step}: tensors of {sizes} bytes for {self._terms.receiver}, which expects "
                f"{list(rooms)} at most; the workers were started from different configs"
            )

    def _see_off(self) -> None:
        try:
            while not self._let_go:
                self._see_one_off()
        except BaseException as error:
            self._alarm.ring(error)

    def _see_one_off(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._leaving or self._let_go, timeout=LOOK_S)
            leaving = self._leaving
            if leaving is None and not self._neighbour.was_replaced():
                return
            self._healing = leaving is None  # nothing may be sent to a receiver that is gone
        try:
            if leaving is None:
                raise LostPeerError(f"{self._terms.receiver} was replaced")
            self._deliver(leaving.sent, leaving.ready, self._connection)
        except LostPeerError as lost:
            self._heal(lost)
        del leaving  # or it would keep its tensors alive until the next one
        with self._condition:
            self._leaving, self._healing = None, False
            self._condition.notify_all()

    def _deliver(self, sent: Sent, ready: Any, connection: Connection) -> None:
        """Return when the receiver has taken it; raises LostPeerError where the link broke."""
        line, header = connection.line, self._header(sent)  # alive until it is taken
        with lost_if_broken(self._terms.receiver):
            header_work = connection.group.send([header], RECEIVER, HEADER_TAG)
            line.complete(header_work, line.post(sent.parts, ready))
        sent.require_unchanged(self._terms.receiver)
        # The receiver posts the receive of a header only after it has the whole micro-batch before.
        self.received_index = max(self.received_index, sent.index - 1)

    def _header(self, sent: Sent) -> Tensor:
        if sent.labelled is None:
            return self._writer.end()
        return self._writer.write(sent.labelled, sent.parts, sent.has_image)

    def _heal(self, lost: LostPeerError) -> None:
        """Open the link to the receiver's replacement, and send again what it lacks."""
        while True:
            try:
                connection = self._neighbour.reconnect(lost, self.received_index + 1)
                with self._condition:
                    missing = self._log.since(connection.next_index, self._terms.receiver)
                    self.sent_bytes += sum(sent.payload_bytes for sent in missing)
                for sent in missing:
                    sent.require_unchanged(self._terms.receiver)
                    self._deliver(sent, connection.line.ready(), connection)
                self._connection = connection
                return
            except LostPeerError as again:
                lost = again
