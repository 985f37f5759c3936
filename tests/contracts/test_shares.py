"""Rows between stages with different numbers of replicas: who gets which, and that none is lost or changed."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.shares import JoinedInbox, SplitOutbox
from pipetrgl.channels.threads import ThreadInbox, ThreadOutbox, thread_link
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, joined
from pipetrgl.world import World
from tests.contracts.test_channels import micro_batch


def links(count: int) -> tuple[list[ThreadOutbox], list[ThreadInbox]]:
    pairs = [thread_link(4, CODECS["fp32"], Alarm(), 5.0) for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def test_shares_are_those_of_the_drawing() -> None:
    world = World((1, 2, 3))
    rows = range(8)
    assert [world.share(world.place(rank), rows) for rank in (1, 2)] == [range(4), range(4, 8)]
    assert [world.share(world.place(rank), rows) for rank in (3, 4, 5)] == [range(2), range(2, 5), range(5, 8)]
    assert [place.replica for place in world.receivers(world.place(1))] == [0, 1]
    assert [place.replica for place in world.receivers(world.place(2))] == [1, 2]
    assert [place.replica for place in world.senders(world.place(4))] == [0, 1]
    assert world.senders(world.place(0)) == world.receivers(world.place(5)) == ()


@pytest.mark.parametrize(("before", "behind"), list(itertools.product((1, 2, 3, 4, 5), repeat=2)))
def test_every_row_has_exactly_one_link_whatever_the_number_of_rows(before: int, behind: int) -> None:
    world = World((before, behind))
    for num_rows in range(5, 40):
        rows = range(3, 3 + num_rows)
        met = []
        for sender in world.group(world.place(0)):
            for receiver in world.receivers(sender):
                assert sender in world.senders(receiver)
                mine, theirs = set(world.share(sender, rows)), set(world.share(receiver, rows))
                met += sorted(mine & theirs)
        assert sorted(met) == list(rows)


def test_what_is_split_and_joined_again_is_the_same() -> None:
    whole = micro_batch(0, torch.randn(7, 2), rows=7)
    pieces = [whole.share(range(0, 3)), whole.share(range(3, 3)), whole.share(range(3, 7))]
    assert [piece.num_rows for piece in pieces] == [3, 0, 4]
    assert pieces[2].activation.data_ptr() == whole.activation[3:].data_ptr()  # nothing is copied
    assert all(piece.whole == range(7) for piece in pieces)
    again = joined(pieces)
    assert again.activation.equal(whole.activation)
    assert again.positions.equal(whole.positions)
    assert (again.rows, again.whole) == (range(7), range(7))


def test_a_split_outbox_gives_each_receiver_its_rows_and_a_joined_inbox_puts_them_together() -> None:
    world = World((1, 2, 1))
    outboxes, inboxes = links(2)
    split = SplitOutbox(outboxes, [lambda rows, j=j: world.share(world.place(1 + j), rows) for j in (0, 1)])
    sent = [micro_batch(index, rows=5) for index in range(3)]
    for one in sent:
        split.send(one)
    split.close()
    assert split.sent_bytes == 3 * 5 * 2 * 4
    assert split.received_index == 2
    received = []
    for one in JoinedInbox(inboxes):
        received.append((one.index, one.activation.clone(), one.rows))
    assert [index for index, _, _ in received] == [0, 1, 2]
    assert all(got.equal(one.activation) for (_, got, _), one in zip(received, sent, strict=True))
    assert all(rows == range(5) for _, _, rows in received)


def test_replicas_that_lose_step_are_noticed() -> None:
    outboxes, inboxes = links(2)
    outboxes[0].send(micro_batch(0))
    outboxes[1].send(micro_batch(1))
    with pytest.raises(LinkError, match="2 of 2 shares of micro-batch 0: they do not work on the same stream"):
        next(iter(JoinedInbox(inboxes)))
    outboxes, inboxes = links(2)
    outboxes[0].send(micro_batch(0))
    outboxes[1].close()
    with pytest.raises(LinkError, match="1 of 2 shares of micro-batch 0"):
        next(iter(JoinedInbox(inboxes)))


def test_a_tick_is_split_and_joined_as_well() -> None:
    tick = micro_batch(0, (), rows=4)
    pieces = [tick.share(range(0, 2)), tick.share(range(2, 4))]
    assert all(piece.is_tick for piece in pieces)
    again: MicroBatch = joined(pieces)
    assert again.is_tick
    assert again.num_rows == 4
