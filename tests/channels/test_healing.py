"""A link whose one side is replaced: the other side opens it again, and nothing is lost, doubled or out of order."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.inbox import LinkInbox
from pipetrgl.channels.link import Connection, LinkTerms, LostPeerError
from pipetrgl.channels.outbox import LinkOutbox
from pipetrgl.channels.payload import GlooLine
from pipetrgl.channels.replay import ReplayLog
from pipetrgl.errors import ReplayGapError
from tests.channels.test_link import groups, micro_batch

TERMS = LinkTerms(7, 2, CODECS["fp32"], 32, 20.0, "stage 0 (rank 0)", "stage 1 (rank 1)")


@dataclass
class Replacements:
    """A neighbour whose replacements the test hands over."""

    waiting: list[Connection] = field(default_factory=list)

    def was_replaced(self) -> bool:
        return bool(self.waiting)

    def reconnect(self, lost: LostPeerError, next_index: int) -> Connection:
        deadline = time.monotonic() + 20
        while not self.waiting:
            if time.monotonic() > deadline:
                raise lost
            time.sleep(0.01)
        return self.waiting.pop()


class Link:
    """Both sides in this process; either can be replaced."""

    def __init__(self, log_bytes: int = 10**6) -> None:
        self.alarm = Alarm()
        self.receivers, self.senders = Replacements(), Replacements()
        sender, receiver = self.connections(0)
        self.log = ReplayLog(log_bytes)
        self.outbox = LinkOutbox(sender, TERMS, self.alarm, self.receivers, self.log)
        self.inbox = self.open_inbox(receiver)

    def connections(self, next_index: int) -> list[Connection]:
        return [Connection(group, GlooLine(group, 1 - side), next_index) for side, group in enumerate(groups())]

    def open_inbox(self, connection: Connection) -> LinkInbox:
        return LinkInbox(connection, TERMS, self.alarm, self.senders, [], torch.device("cpu"))

    def replace_receiver(self, next_index: int) -> LinkInbox:
        sender, receiver = self.connections(next_index)
        self.receivers.waiting.append(sender)
        while self.receivers.was_replaced():  # a receiver that is really dead would break the link at the next send
            time.sleep(0.01)
        self.inbox = self.open_inbox(receiver)
        return self.inbox

    def close(self) -> None:
        self.outbox.let_go()
        self.inbox.close()


@pytest.fixture
def link() -> Iterator[Link]:
    one = Link()
    yield one
    one.close()


def send(outbox: LinkOutbox, indices: range, end: bool = True) -> threading.Thread:
    def work() -> None:
        for index in indices:
            outbox.send(micro_batch(index, torch.full((1, 2), float(index))))
        if end:
            outbox.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def take(inbox: LinkInbox) -> list[tuple[int, float]]:
    return [(got.index, float(got.activation[0, 0])) for got in inbox]


def test_a_replaced_receiver_gets_again_what_it_asks_for_and_then_the_rest(link: Link) -> None:
    #   sent 0 1 2 3 4 │ the receiver dies, its checkpoint covers 0 and 1 │ again 2 3 4, then 5 .. 9
    thread = send(link.outbox, range(5), end=False)
    stream = iter(link.inbox)
    for _ in range(4):
        next(stream)
    thread.join()
    inbox = link.replace_receiver(next_index=2)
    send(link.outbox, range(5, 10))
    assert take(inbox) == [(index, float(index)) for index in range(2, 10)]


def test_a_replaced_receiver_is_noticed_where_the_sender_has_nothing_to_send(link: Link) -> None:
    send(link.outbox, range(3)).join(1.0)
    assert len(take(link.inbox)) == 3  # and the end of the stream
    assert take(link.replace_receiver(next_index=1)) == [(1, 1.0), (2, 2.0)]


def test_a_receiver_that_needs_more_than_is_kept_is_an_error_of_its_own(link: Link) -> None:
    thread = send(link.outbox, range(6), end=False)
    stream = iter(link.inbox)
    for _ in range(5):
        next(stream)
    thread.join()
    link.outbox.trim(4)
    link.replace_receiver(next_index=3)
    with pytest.raises(ReplayGapError, match="needs micro-batch 3 again, but only 4 and later are kept"):
        while True:
            link.alarm.check()
            time.sleep(0.01)


def test_a_replaced_sender_drops_what_the_receiver_has(link: Link) -> None:
    #   old sender: 0 1 2 3 ✝        new sender starts again at 1: 1 2 3 are dropped, 4 .. 7 are sent
    send(link.outbox, range(4), end=False)
    stream = iter(link.inbox)
    first = [next(stream).index for _ in range(4)]
    sender, receiver = link.connections(next_index=4)
    link.senders.waiting.append(receiver)
    link.outbox._posted = None  # never absent: the outbox's thread looks at it
    del link.outbox._connection  # the old sender's process is gone, and its sockets with it
    outbox = LinkOutbox(sender, TERMS, link.alarm, Replacements(), ReplayLog(10**6))
    thread = send(outbox, range(1, 8))
    assert first + [got.index for got in stream] == list(range(8))
    thread.join()
    assert outbox.sent_bytes == 4 * 8
    assert outbox.received_index == 7
    outbox.let_go()


@pytest.mark.parametrize("rooms", [(), (8,)])
def test_a_payload_that_breaks_off_comes_again_and_leaves_what_is_in_use_alone(link: Link, rooms: tuple[int]) -> None:
    #   old sender: 0, half of 1 ✝      new sender: 1 2          the stage has 0 in hand all the while
    sender, receiver = (dataclasses.replace(side, rooms=rooms) for side in link.connections(next_index=0))
    fill, turns = receiver.line.fill, itertools.count()

    def break_off_once(slot: int, buffers: tuple[torch.Tensor, ...]) -> None:
        if next(turns) == 1:
            raise RuntimeError("connection reset by peer")
        fill(slot, buffers)

    receiver.line.fill = break_off_once
    inbox = LinkInbox(receiver, TERMS, link.alarm, link.senders, [], torch.device("cpu"))
    outbox = LinkOutbox(sender, TERMS, link.alarm, Replacements(), ReplayLog(0))
    send(outbox, range(1), end=False).join()
    stream = iter(inbox)
    first = next(stream)
    send(outbox, range(1, 2), end=False).join()
    again, there = link.connections(next_index=1)
    link.senders.waiting.append(there)
    replacement = LinkOutbox(again, TERMS, link.alarm, Replacements(), ReplayLog(0))
    thread = send(replacement, range(1, 3))
    while not inbox._box._ready:
        link.alarm.check()
        time.sleep(0.01)
    assert first.activation.tolist() == [[0.0, 0.0]]
    assert [(got.index, float(got.activation[0, 0])) for got in stream] == [(1, 1.0), (2, 2.0)]
    thread.join()
    outbox._posted = None
    for one in (outbox, replacement):
        one.let_go()
    inbox.close()


def test_a_sender_counts_as_received_only_what_it_knows_of(link: Link) -> None:
    assert link.outbox.received_index == -1
    thread = send(link.outbox, range(3))
    take(link.inbox)
    thread.join()
    assert link.outbox.received_index == 2  # the end of the stream was taken, and with it all before
