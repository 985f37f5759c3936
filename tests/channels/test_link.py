"""What only links over torch.distributed promise: credits, reused slots, checks before the payload, broken peers."""

from __future__ import annotations

import dataclasses
import threading

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
) -> tuple[LinkOutbox, LinkInbox, Alarm]:
    sender, receiver = (Connection(group, GlooLine(group, 1 - side), next_index) for side, group in enumerate(groups()))
    alarm = Alarm()
    terms = LinkTerms(7, capacity, CODECS["fp32"], 32, 20.0, "stage 0 (rank 0)", "stage 1 (rank 1)")
    inbox = LinkInbox(receiver, terms, alarm, Irreplaceable(), expected, torch.device("cpu"), image)
    return LinkOutbox(sender, terms, alarm, Irreplaceable(), ReplayLog(0)), inbox, alarm


def test_slots_take_capacity_activations_and_no_more() -> None:
    outbox, inbox, _ = link(capacity=3)

    def work() -> None:
        for index in range(12):
            outbox.send(micro_batch(index, torch.randn(4, 8)))
        outbox.close()

    thread = threading.Thread(target=work)
    thread.start()
    addresses = {got.activation.data_ptr() for got in inbox}
    thread.join()
    inbox.close()
    assert len(addresses) == 3
    assert inbox.slot_bytes == 3 * 4 * 8 * 4


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


def test_a_header_reads_back_as_written() -> None:
    sent = micro_batch(9, torch.zeros(2, 3))
    sent = dataclasses.replace(sent, split=Split.VALID, epoch=4, closes_split=True, closes_phase=True)
    header = wire.read(wire.write(sent, [sent.activation], codec=2, run_id=7, words=10).numpy(), run_id=7)
    assert header.tensors == (wire.TensorSpec((2, 3), torch.float32),)
    assert (header.codec, header.kind) == (2, wire.Kind.DATA)
    flags = ("closes_step", "closes_split", "closes_phase")
    for field in ("split", "epoch", "step", "index", "row_start", "batch_rows", *flags):
        assert getattr(header.labelled, field) == getattr(sent, field)


def test_a_header_of_another_run_or_version_is_refused() -> None:
    header = wire.write_end(run_id=7, words=0).numpy()
    with pytest.raises(LinkError, match="another run"):
        wire.read(header, run_id=8)
    header[0] = 99
    with pytest.raises(LinkError, match="wire protocol 99"):
        wire.read(header, run_id=7)


def test_more_labels_than_agreed_are_refused() -> None:
    with pytest.raises(LinkError, match="4 rows of labels do not fit the 7 words"):
        wire.write(micro_batch(0, torch.zeros(4, 1)), [torch.zeros(4, 1)], codec=0, run_id=0, words=7)


def test_int8_quarters_and_bf16_halves_the_bytes() -> None:
    activation = torch.randn(4, 64)
    plain = activation.nbytes
    assert sum(part.nbytes for part in CODECS["bf16"].encode(activation)) == plain / 2
    assert sum(part.nbytes for part in CODECS["int8"].encode(activation)) == plain / 4 + 4 * 4  # one scale a sample
