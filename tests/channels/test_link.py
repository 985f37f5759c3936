"""What only links over torch.distributed promise: credits, reused slots, checks before the payload, broken peers."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroup

from pipetrgl.channels import wire
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import gloo_pair
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.inbox import LinkInbox
from pipetrgl.channels.link import Connection, Irreplaceable, LinkTerms
from pipetrgl.channels.outbox import LinkOutbox
from pipetrgl.channels.payload import GlooLine
from pipetrgl.channels.replay import ReplayLog
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, Split


def micro_batch(index: int, activation: torch.Tensor) -> MicroBatch:
    rows = activation.shape[0]
    labels = torch.arange(rows)
    return MicroBatch(activation, labels, labels, Split.TRAIN, 0, index, index, 0, rows, True, False)


def groups() -> list[ProcessGroup]:
    store, built = HashStore(), {}

    def build(side: int) -> None:
        built[side] = gloo_pair(store, side, "127.0.0.1", 20.0)

    threads = [threading.Thread(target=build, args=(side,)) for side in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [built[0], built[1]]


def link(
    capacity: int = 2,
    expected: tuple[wire.TensorSpec, ...] = (),
    next_index: int = 0,
    image: wire.TensorSpec | None = None,
    rooms: tuple[int, ...] = (),
    sending: Callable[[ProcessGroup, int], Any] = GlooLine,
) -> tuple[LinkOutbox, LinkInbox, Alarm]:
    sender, receiver = (
        Connection(group, line(group, 1 - side), next_index, rooms)
        for side, (group, line) in enumerate(zip(groups(), (sending, GlooLine), strict=True))
    )
    alarm = Alarm()
    terms = LinkTerms(7, capacity, CODECS["fp32"], 32, 20.0, "stage 0 (rank 0)", "stage 1 (rank 1)")
    inbox = LinkInbox(receiver, terms, alarm, Irreplaceable(), expected, torch.device("cpu"), image)
    return LinkOutbox(sender, terms, alarm, Irreplaceable(), ReplayLog(0)), inbox, alarm


def send_all(outbox: LinkOutbox, micro_batches: Iterable[MicroBatch]) -> threading.Thread:
    """Sends them, and the end of the stream, in a thread."""

    def work() -> None:
        for one in micro_batches:
            outbox.send(one)
        outbox.close()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_slots_take_capacity_activations_and_no_more() -> None:
    outbox, inbox, _ = link(capacity=3)
    thread = send_all(outbox, (micro_batch(index, torch.randn(4, 8)) for index in range(12)))
    addresses = {got.activation.data_ptr() for got in inbox}
    thread.join()
    inbox.close()
    assert len(addresses) == 3
    assert inbox.slot_bytes == 3 * 4 * 8 * 4


@pytest.mark.parametrize("capacity", [1, 3])
def test_what_was_expected_ahead_waits_for_the_next_that_has_it(capacity: int) -> None:
    """Smaller ones, ticks, images that only some carry: each arrives as it was sent, while older ones are in use."""
    row = wire.TensorSpec((8,), torch.float32), wire.TensorSpec((1, 2, 2), torch.float32)
    outbox, inbox, _ = link(capacity, row[:1], image=row[1], rooms=(6 * 8 * 4, 6 * 4 * 4))
    random = torch.Generator().manual_seed(0)
    batches = []
    for index, (rows, kind) in enumerate(zip(*torch.randint(0, 6, (2, 60), generator=random).tolist(), strict=True)):
        one = micro_batch(index, torch.randn(rows + 1, 8, generator=random))
        image = torch.randn(rows + 1, 1, 2, 2, generator=random)
        batches.append(one.as_tick() if kind == 0 else one.beside(image) if kind < 3 else one)
    thread = send_all(outbox, batches)
    addresses = set()
    for sent, got in zip(batches, inbox, strict=True):
        addresses.update(tensor.data_ptr() for tensor in got.tensors)
        time.sleep(0.002)  # what comes behind it is being received meanwhile
        assert len(got.tensors) == len(sent.tensors)
        assert all(torch.equal(*pair) for pair in zip(got.tensors, sent.tensors, strict=True))
    thread.join()
    inbox.close()
    assert len(addresses) == 2 * capacity
    assert inbox.slot_bytes == capacity * (6 * 8 * 4 + 6 * 4 * 4)


class NotedLine:
    """The sending side of a line that notes which thread calls it, and gives out numbers for what is ready."""

    def __init__(self, group: ProcessGroup, peer: int) -> None:
        self._line = GlooLine(group, peer)
        self._count = itertools.count()
        self.calls: list[tuple[str, str, int]] = []

    def ready(self) -> int:
        self.calls.append(("ready", threading.current_thread().name, number := next(self._count)))
        return number

    def post(self, parts: Sequence[torch.Tensor], ready: int) -> object:
        self.calls.append(("post", threading.current_thread().name, ready))
        return self._line.post(parts, None)

    def complete(self, header: object, posted: object) -> None:
        self._line.complete(header, posted)


def test_the_stages_thread_says_what_is_ready_and_the_links_thread_sends_it() -> None:
    """On a GPU the first records an event on the stage's stream, and the second waits for that very one."""
    lines: list[NotedLine] = []

    def noted(group: ProcessGroup, peer: int) -> NotedLine:
        lines.append(NotedLine(group, peer))
        return lines[0]

    outbox, inbox, _ = link(sending=noted)
    thread = send_all(outbox, [micro_batch(index, torch.zeros(4, 8)) for index in range(3)])
    assert len(list(inbox)) == 3
    thread.join()
    inbox.close()
    ready, post = ([call for call in lines[0].calls if call[0] == what] for what in ("ready", "post"))
    assert ready == [("ready", thread.name, number) for number in range(4)]  # the end of the stream is one more
    assert post == [("post", "to stage 1 (rank 1)", number) for number in range(4)]


def test_a_tensor_for_which_the_receiver_has_no_room_is_not_sent() -> None:
    outbox, inbox, _ = link(rooms=(4 * 8 * 4,))
    with pytest.raises(
        LinkError, match=r"step 0: tensors of \[160\] bytes for stage 1 .*, which expects \[128\] at most"
    ):
        outbox.send(micro_batch(0, torch.zeros(5, 8)))
    outbox.let_go()
    inbox.close()


def test_a_change_in_place_while_sending_is_detected() -> None:
    outbox, _inbox, alarm = link(capacity=1)
    activation = torch.ones(4, 8)
    outbox.send(micro_batch(0, activation.clone()))  # fills the only slot
    outbox.send(micro_batch(1, activation))  # cannot leave yet
    activation.add_(1)
    with pytest.raises(LinkError, match="step 1: the activation for stage 1 .* was changed in place"):
        for _ in _inbox:
            pass
    assert alarm.rang


def test_an_activation_of_another_shape_is_refused_before_it_is_received() -> None:
    outbox, inbox, _ = link(expected=(wire.TensorSpec((64, 8, 8), torch.float32),), next_index=1200)
    outbox.send(micro_batch(1200, torch.zeros(4, 32, 16, 16)))
    with pytest.raises(
        LinkError,
        match=r"stage 1 \(rank 1\), step 1200: got activation \(4, 32, 16, 16\) float32 from stage 0 \(rank 0\), "
        r"expected \(4, 64, 8, 8\) float32; the workers were started from different configs",
    ):
        next(iter(inbox))


def test_a_tick_passes_whatever_activations_are_expected() -> None:
    outbox, inbox, _ = link(expected=(wire.TensorSpec((8,), torch.float32),))
    outbox.send(micro_batch(0, torch.zeros(4, 8)))
    outbox.send(micro_batch(1, torch.zeros(4, 8)).carrying(()))
    assert [got.is_tick for _, got in zip(range(2), inbox, strict=False)] == [False, True]
    outbox.close()
    inbox.close()


def test_a_micro_batch_out_of_order_is_refused() -> None:
    outbox, inbox, _ = link(next_index=3)
    outbox.send(micro_batch(3, torch.zeros(1, 1)))
    outbox.send(micro_batch(5, torch.zeros(1, 1)))
    with pytest.raises(LinkError, match=r"got micro-batch 5 from stage 0 \(rank 0\), expected 4"):
        list(inbox)


def written(writer: wire.Writer, one: MicroBatch) -> wire.Words:
    words: wire.Words = writer.write(one.as_tick(), one.tensors, one.image is not None).numpy()
    return words


def test_a_header_reads_back_as_written() -> None:
    sent = micro_batch(9, torch.zeros(2, 3))
    sent = dataclasses.replace(sent, split=Split.VALID, epoch=4, closes_split=True, closes_phase=True)
    header = wire.Reader(7).read(written(wire.Writer(codec=2, run_id=7, words=10), sent))
    assert header.layout == wire.Layout(2, (wire.TensorSpec((2, 3), torch.float32),), False, (2,))
    assert header.kind is wire.Kind.DATA
    flags = ("closes_step", "closes_split", "closes_phase")
    for field in ("split", "epoch", "step", "index", "row_start", "batch_rows", *flags):
        assert getattr(header.labelled, field) == getattr(sent, field)


def test_a_layout_is_written_and_read_anew_only_where_it_changes() -> None:
    writer, reader = wire.Writer(codec=0, run_id=7, words=16), wire.Reader(7)
    whole, last = (micro_batch(index, torch.zeros(rows, 3)) for index, rows in enumerate((4, 2)))
    image = dataclasses.replace(whole, image=torch.zeros(4, 1, 2, 2), share_of=range(4, 9))
    stream = [whole, whole, last, image, last.as_tick(), whole]
    headers = [reader.read(written(writer, one)) for one in stream]
    assert headers[1].layout is headers[0].layout
    wanted = [[(4, 3)], [(4, 3)], [(2, 3)], [(4, 3), (4, 1, 2, 2)], [], [(4, 3)]]
    assert [[spec.shape for spec in header.layout.tensors] for header in headers] == wanted
    assert [header.layout.has_image for header in headers] == [False, False, False, True, False, False]
    assert [header.labelled.share_of for header in headers] == [None, None, None, range(4, 9), None, None]
    for header, one in zip(headers, stream, strict=True):
        assert torch.equal(header.labelled.target, one.target)
        assert torch.equal(header.labelled.positions, one.positions)


def test_a_header_of_another_run_or_version_is_refused() -> None:
    header = wire.Writer(0, 7, 0).end().numpy()
    assert wire.Reader(7).read(header).kind is wire.Kind.END
    with pytest.raises(LinkError, match="another run"):
        wire.Reader(8).read(header)
    header[0] = 99
    with pytest.raises(LinkError, match="wire protocol 99"):
        wire.Reader(7).read(header)


def test_more_labels_than_agreed_are_refused() -> None:
    with pytest.raises(LinkError, match="4 rows of labels do not fit the 7 words"):
        written(wire.Writer(0, 0, words=7), micro_batch(0, torch.zeros(4, 1)))


def test_int8_quarters_and_bf16_halves_the_bytes() -> None:
    activation = torch.randn(4, 64)
    plain = activation.nbytes
    assert sum(part.nbytes for part in CODECS["bf16"].encode(activation)) == plain / 2
    assert sum(part.nbytes for part in CODECS["int8"].encode(activation)) == plain / 4 + 4 * 4  # one scale a sample
