"""One suite that every channel must pass: thread queues, links over torch.distributed, and links with a delay."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.distributed import HashStore, ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import gloo_pair
from pipetrgl.channels.codecs import CODECS, Codec, decode, encode
from pipetrgl.channels.contracts import Inbox, Outbox, WatchedInbox
from pipetrgl.channels.delayed import DelayedInbox
from pipetrgl.channels.inbox import LinkInbox
from pipetrgl.channels.link import Connection, Irreplaceable, LinkTerms
from pipetrgl.channels.outbox import LinkOutbox
from pipetrgl.channels.payload import GlooLine
from pipetrgl.channels.replay import ReplayLog
from pipetrgl.channels.replaying import ReplayingInbox
from pipetrgl.channels.threads import thread_link
from pipetrgl.channels.wire import label_words
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import Activation, MicroBatch, Split


@dataclass
class Channel:
    """Both sides of a channel in this process."""

    outbox: Outbox
    inbox: Inbox
    alarm: Alarm
    extra: int = 0
    """Micro-batches that it holds beyond its capacity."""


Open = Callable[..., Channel]


def open_threads(capacity: int = 2, codec: Codec = CODECS["fp32"], timeout_s: float = 20.0) -> Channel:
    alarm = Alarm()
    return Channel(*thread_link(capacity, codec, alarm, timeout_s), alarm)


def open_gloo(
    capacity: int = 2, codec: Codec = CODECS["fp32"], timeout_s: float = 20.0, rooms: tuple[int, ...] = ()
) -> Channel:
    """A real link, its two sides in two threads' hands."""
    store, alarm = HashStore(), Alarm()
    groups: dict[int, ProcessGroup] = {}

    def build(side: int) -> None:
        groups[side] = gloo_pair(store, side, "127.0.0.1", 20.0)

    threads = [threading.Thread(target=build, args=(side,)) for side in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    terms = LinkTerms(7, capacity, codec, label_words(64), timeout_s, "stage 0 (rank 0)", "stage 1 (rank 1)")
    sender, receiver = (Connection(groups[side], GlooLine(groups[side], 1 - side), 0, rooms) for side in (0, 1))
    return Channel(
        LinkOutbox(sender, terms, alarm, Irreplaceable(), ReplayLog(0)),
        LinkInbox(receiver, terms, alarm, Irreplaceable(), [], torch.device("cpu")),
        alarm,
    )


def open_delayed(capacity: int = 2, codec: Codec = CODECS["fp32"], timeout_s: float = 20.0) -> Channel:
    """A channel of threads on a long cable."""
    inner, cable = open_threads(capacity, codec, timeout_s), 2
    stream = torch.Generator().manual_seed(0)
    inbox = DelayedInbox(inner.inbox, 0.02, 0.02, stream, inner.alarm, cable)
    return Channel(inner.outbox, inbox, inner.alarm, extra=cable)


def open_replaying(capacity: int = 2, codec: Codec = CODECS["fp32"], timeout_s: float = 20.0) -> Channel:
    """A channel of threads whose receiver keeps what it gets, but may use nothing twice."""
    inner = open_threads(capacity, codec, timeout_s)
    assert isinstance(inner.inbox, WatchedInbox)
    return Channel(inner.outbox, ReplayingInbox(inner.inbox, size=3, max_reuse=1), inner.alarm)


KINDS = {
    "threads": open_threads,
    "gloo": open_gloo,
    "gloo, expecting": partial(open_gloo, rooms=(2**20, 2**20)),
    "delayed": open_delayed,
    "replaying": open_replaying,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def channel(request: pytest.FixtureRequest) -> Iterator[Open]:
    opened: list[Channel] = []

    def open_one(**options: object) -> Channel:
        opened.append(request.param(**options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.inbox.close()


def micro_batch(index: int, activation: Activation | None = None, rows: int = 3) -> MicroBatch:
    if activation is None:
        activation = torch.full((rows, 2), float(index))
    return MicroBatch(
        activation=activation,
        target=torch.arange(rows),
        positions=torch.arange(rows) + 10 * index,
        split=Split.TRAIN,
        epoch=0,
        step=index,
        index=index,
        row_start=0,
        batch_rows=rows,
        closes_step=True,
        closes_split=False,
    )


def send_all(channel: Channel, batches: list[MicroBatch]) -> threading.Thread:
    def work() -> None:
        for batch in batches:
            channel.outbox.send(batch)
        channel.outbox.close()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_micro_batches_arrive_whole_and_in_order_until_the_sender_closes(channel: Open) -> None:
    both = channel()
    thread = send_all(both, [micro_batch(index, rows=1 + index % 3) for index in range(20)])
    for index, got in enumerate(both.inbox):
        want = micro_batch(index, rows=1 + index % 3)
        assert torch.equal(got.activation, want.activation)
        assert torch.equal(got.target, want.target)
        assert torch.equal(got.positions, want.positions)
        assert (got.step, got.index, got.closes_step, got.closes_split) == (index, index, True, False)
    assert index == 19
    thread.join()


def test_a_target_of_every_token_arrives_in_its_shape(channel: Open) -> None:
    both = channel()
    target = torch.arange(3 * 5).view(3, 5)
    thread = send_all(both, [dataclasses.replace(micro_batch(0), target=target)])
    (got,) = both.inbox
    thread.join()
    assert torch.equal(got.target, target)
    assert (got.num_rows, got.targets_per_row) == (3, 5)


def test_what_a_send_takes_along_is_counted_when_it_returns(channel: Open) -> None:
    both = channel()
    for count in (1, 2):
        both.outbox.send(micro_batch(count - 1))
        assert both.outbox.sent_bytes == count * 3 * 2 * 4


def test_a_stream_without_micro_batches_ends(channel: Open) -> None:
    both = channel()
    thread = send_all(both, [])
    assert list(both.inbox) == []
    thread.join()


def test_evaluations_and_flags_travel_in_the_same_stream(channel: Open) -> None:
    import dataclasses

    both = channel()
    sent = dataclasses.replace(
        micro_batch(0), split=Split.TEST, epoch=3, row_start=5, batch_rows=9, closes_step=False, closes_split=True
    )
    thread = send_all(both, [sent])
    (got,) = [dataclasses.replace(batch, activation=batch.activation.clone()) for batch in both.inbox]
    fields = ("split", "epoch", "row_start", "batch_rows", "closes_step", "closes_split")
    assert [getattr(got, field) for field in fields] == [Split.TEST, 3, 5, 9, False, True]
    thread.join()


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_tick_travels_between_activations_with_its_labels_and_flags_and_costs_no_byte(
    channel: Open, name: str
) -> None:
    import dataclasses

    both = channel(codec=CODECS[name])
    tick = dataclasses.replace(micro_batch(1).carrying(()), index=0, closes_phase=True)
    thread = send_all(both, [tick])
    (got,) = list(both.inbox)
    assert got.is_tick
    assert (got.step, got.closes_step, got.closes_phase, got.positions.tolist()) == (1, True, True, [10, 11, 12])
    thread.join()
    assert both.outbox.sent_bytes == 0

    mixed = channel(codec=CODECS[name])
    thread = send_all(mixed, [micro_batch(0), dataclasses.replace(tick, index=1), micro_batch(2)])
    assert [(got.is_tick, got.closes_phase) for got in mixed.inbox] == [(False, False), (True, True), (False, False)]
    thread.join()


def test_a_tuple_of_tensors_of_several_dtypes_arrives_as_it_was(channel: Open) -> None:
    both = channel()
    parts = (torch.randn(2, 3, 4), torch.arange(2), torch.randn(2, 1, dtype=torch.float64))
    thread = send_all(both, [micro_batch(0, parts, rows=2)])
    for got in both.inbox:
        assert isinstance(got.activation, tuple)
        for arrived, left in zip(got.activation, parts, strict=True):
            assert arrived.dtype == left.dtype
            assert torch.equal(arrived, left)
    thread.join()


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_fast_sender_waits_when_the_channel_is_full(channel: Open, capacity: int) -> None:
    both = channel(capacity=capacity)
    sent: list[int] = []

    def work() -> None:
        for index in range(10):
            both.outbox.send(micro_batch(index))
            sent.append(index)
        both.outbox.close()

    thread = threading.Thread(target=work)
    thread.start()
    stream = iter(both.inbox)
    for taken in range(10):
        next(stream)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            # `capacity` slots, the one in our hands included, and one on its way that only its sender holds
            assert len(sent) <= taken + capacity + both.extra + 1
            time.sleep(0.01)
    assert next(stream, None) is None
    thread.join()
    assert both.outbox.waited_s > 0


def test_the_receiver_cannot_alter_the_senders_tensor(channel: Open) -> None:
    both = channel()
    mine = torch.ones(3, 2)
    thread = send_all(both, [micro_batch(0, mine)])
    for got in both.inbox:
        got.activation.zero_()
    thread.join()
    assert torch.equal(mine, torch.ones(3, 2))


def test_a_slow_sender_is_waited_for_and_the_wait_is_counted(channel: Open) -> None:
    both = channel()

    def work() -> None:
        time.sleep(0.2)
        both.outbox.send(micro_batch(0))
        both.outbox.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert len(list(both.inbox)) == 1
    thread.join()
    assert both.inbox.waited_s > 0.1


def test_a_silent_sender_is_named_at_the_deadline(channel: Open) -> None:
    both = channel(timeout_s=0.3)
    with pytest.raises(LinkError, match="waited 0 s for a micro-batch from"):
        next(iter(both.inbox))
    both.outbox.close()


def test_a_silent_receiver_is_named_at_the_deadline(channel: Open) -> None:
    both = channel(timeout_s=0.3, capacity=1)
    with pytest.raises(LinkError, match=r"waited 0 s for .* to (free a slot|take a micro-batch)"):
        for index in range(5):
            both.outbox.send(micro_batch(index))
    both.alarm.ring(LinkError("over"))


def test_an_alarm_ends_the_waits_of_both_sides_with_its_error(channel: Open) -> None:
    both = channel(capacity=1)
    threading.Timer(0.1, both.alarm.ring, [LinkError("stage 7 failed")]).start()
    with pytest.raises(LinkError, match="stage 7 failed"):
        next(iter(both.inbox))
    with pytest.raises(LinkError, match="stage 7 failed"):
        for index in range(5):
            both.outbox.send(micro_batch(index))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8"])
def test_a_codec_gives_what_the_serial_loop_computes(channel: Open, name: str) -> None:
    codec = CODECS[name]
    both = channel(codec=codec)
    left = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    thread = send_all(both, [micro_batch(0, left, rows=5)])
    for got in both.inbox:
        assert torch.equal(got.activation, decode(codec, encode(codec, left)))
    thread.join()


def test_sent_bytes_count_the_payload(channel: Open) -> None:
    both = channel()
    thread = send_all(both, [micro_batch(index, rows=3) for index in range(4)])
    for _ in both.inbox:
        pass
    thread.join()
    assert both.outbox.sent_bytes == 4 * 3 * 2 * 4


def test_no_deadline_runs_while_some_stage_is_being_replaced(channel: Open) -> None:
    both = channel(timeout_s=0.3)
    both.alarm.paused = True
    threading.Timer(1.0, lambda: setattr(both.alarm, "paused", False)).start()
    with pytest.raises(LinkError, match="waited 0 s for a micro-batch from"):
        next(iter(both.inbox))
    assert not both.alarm.paused  # the deadline alone would have ended the wait long before
    both.outbox.close()


@pytest.mark.parametrize("kind", ["threads", "gloo", "delayed"])
def test_an_inbox_knows_without_waiting_whether_its_next_micro_batch_is_late(kind: str) -> None:
    both = KINDS[kind]()
    inbox = both.inbox
    assert isinstance(inbox, WatchedInbox)
    assert inbox.is_late
    stream = iter(inbox)
    both.outbox.send(micro_batch(0))
    wait_for_arrival(inbox)
    next(stream)
    assert inbox.is_late  # also while a micro-batch is in hand
    thread = send_all(both, [micro_batch(1)])
    wait_for_arrival(inbox)
    next(stream)
    wait_for_arrival(inbox)  # of the end
    assert next(stream, None) is None
    assert not inbox.is_late
    thread.join()
    inbox.close()


@pytest.mark.parametrize("kind", ["threads", "gloo", "delayed"])
def test_an_alarm_is_never_late(kind: str) -> None:
    both = KINDS[kind]()
    both.alarm.ring(LinkError("stage 7 failed"))
    assert isinstance(both.inbox, WatchedInbox)
    assert not both.inbox.is_late
    both.inbox.close()


def wait_for_arrival(inbox: WatchedInbox) -> None:
    deadline = time.monotonic() + 20
    while inbox.is_late:
        assert time.monotonic() < deadline
        time.sleep(0.001)
