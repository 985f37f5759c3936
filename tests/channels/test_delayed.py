"""An inbox at the end of a long cable; tests/contracts holds it to what every channel promises."""

from __future__ import annotations

import time

import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.delayed import DelayedInbox
from pipetrgl.channels.threads import thread_link
from pipetrgl.errors import LinkError
from tests.contracts.test_channels import Channel, micro_batch, send_all


def long_cable(delay_s: float, cable: int) -> Channel:
    alarm = Alarm()
    outbox, inbox = thread_link(1, CODECS["fp32"], alarm, 20.0)
    return Channel(outbox, DelayedInbox(inbox, delay_s, delay_s / 10, torch.Generator(), alarm, cable), alarm)


def test_delays_overlap_so_all_are_on_their_way_before_the_first_arrives() -> None:
    both = long_cable(delay_s=1.0, cable=40)
    thread = send_all(both, [micro_batch(index) for index in range(40)])
    stream = iter(both.inbox)
    next(stream)
    assert not thread.is_alive()
    assert len(list(stream)) == 39
    both.inbox.close()


def test_no_micro_batch_arrives_before_it_is_due() -> None:
    both = long_cable(delay_s=0.2, cable=2)
    both.outbox.send(micro_batch(0))
    start = time.monotonic()
    both.outbox.send(micro_batch(1))
    both.outbox.close()
    assert [got.index for got in both.inbox] == [0, 1]
    assert time.monotonic() - start >= 0.2
    both.inbox.close()


def test_a_micro_batch_on_the_cable_shares_no_memory_with_the_slot_it_came_from() -> None:
    slot = torch.zeros(3, 2)

    class OneSlot:
        waited_s = 0.0

        def __iter__(self):
            for index in range(3):
                yield micro_batch(index, slot.fill_(index))

        def close(self) -> None:
            pass

    inbox = DelayedInbox(OneSlot(), 0.05, 0.0, torch.Generator(), Alarm())
    assert [float(got.activation[0, 0]) for got in inbox] == [0.0, 1.0, 2.0]
    inbox.close()


def test_what_is_still_on_its_way_is_late() -> None:
    both = long_cable(delay_s=3600.0, cable=2)
    assert isinstance(both.inbox, DelayedInbox)
    both.outbox.send(micro_batch(0))
    deadline = time.monotonic() + 20
    while both.inbox._box.is_late:  # until it has left the thread link
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert both.inbox.is_late
    both.alarm.ring(LinkError("over"))
    assert not both.inbox.is_late
    both.inbox.close()
