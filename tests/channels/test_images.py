"""Images that ride beside the activation: what an outbox of images hands on, and how they travel on a channel."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipetrgl.channels import wire
from pipetrgl.channels.codecs import CODECS, received
from pipetrgl.channels.images import image_outbox
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch, Split, joined
from tests.channels.test_link import link, micro_batch, send_all

CPU = torch.device("cpu")
IMAGE = torch.arange(8.0).view(4, 1, 1, 2)


class Box:
    """An outbox that keeps what it is given."""

    waited_s = 0.5
    sent_bytes = 7
    received_index = 3

    def __init__(self) -> None:
        self.sent: list[MicroBatch] = []

    def send(self, micro_batch: MicroBatch) -> None:
        self.sent.append(micro_batch)

    def close(self) -> None:
        pass


def test_an_image_is_handed_on_as_a_copy_for_its_slot_is_used_again() -> None:
    box, slot = Box(), IMAGE.clone()
    outbox = image_outbox(box, CPU, wanted=True)
    outbox.send(micro_batch(0, torch.ones(4, 3)).beside(slot))
    slot.zero_()
    (sent,) = box.sent
    assert sent.image is not None and sent.image.equal(IMAGE)
    assert (outbox.waited_s, outbox.sent_bytes, outbox.received_index) == (0.5, 7, 3)


def test_an_image_is_left_behind_where_the_receiver_needs_none_and_none_stays_none() -> None:
    box = Box()
    image_outbox(box, CPU, wanted=False).send(micro_batch(0, torch.ones(4, 3)).beside(IMAGE))
    image_outbox(box, CPU, wanted=True).send(micro_batch(1, torch.ones(4, 3)))
    assert [sent.image for sent in box.sent] == [None, None]


def test_a_tick_carries_no_image_and_another_activation_keeps_it() -> None:
    batch = micro_batch(0, torch.ones(4, 3)).beside(IMAGE)
    assert batch.carrying(torch.zeros(4, 2)).image is IMAGE
    tick = batch.as_tick()
    assert tick.is_tick and tick.image is None and tick.tensors == ()


def test_rows_of_an_image_are_split_and_joined_with_those_of_the_activation() -> None:
    batch = dataclasses.replace(micro_batch(0, torch.arange(4.0).view(4, 1)), image=IMAGE)
    first, rest, none = batch.share(range(1)), batch.share(range(1, 4)), batch.share(range(4, 4))
    assert first.image is not None and first.image.flatten().tolist() == [0, 1]
    assert none.image is None
    whole = joined([first, none, rest])
    assert whole.image is not None and whole.image.equal(IMAGE)


@pytest.mark.parametrize("codec", CODECS)
def test_an_image_goes_through_the_codec_of_the_activation(codec: str) -> None:
    batch = micro_batch(0, torch.randn(4, 3)).beside(torch.randn(4, 1, 1, 2))
    seen = received(CODECS[codec], batch)
    alone = received(CODECS[codec], batch.carrying(batch.tensors[1]).beside(None))
    assert seen.image is not None and seen.image.equal(alone.tensors[0])
    assert seen.tensors[0].equal(received(CODECS[codec], batch.beside(None)).tensors[0])


def test_a_link_carries_an_image_where_there_is_one_and_counts_its_bytes() -> None:
    expected = (wire.TensorSpec((3,), torch.float32),)
    outbox, inbox, _ = link(expected=expected, image=wire.TensorSpec((1, 1, 2), torch.float32))
    batches = [micro_batch(index, torch.full((4, 3), float(index))) for index in range(4)]
    batches = [batch.beside(IMAGE + batch.index) if batch.index % 2 else batch for batch in batches]
    batches[2] = batches[2].as_tick()
    thread = send_all(outbox, batches)
    got = [(one.is_tick, None if one.image is None else one.image.flatten().tolist()) for one in inbox]
    thread.join()
    inbox.close()
    assert got == [(False, None), (False, [1.0 * n for n in range(1, 9)]), (True, None), (False, list(range(3, 11)))]
    #  three activations of 4 x 3, and two images of 4 x 2
    assert outbox.sent_bytes == 4 * (3 * 12 + 2 * 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "got 2 tensors from stage 0 .*, expected 1"),
        (wire.TensorSpec((1, 2, 2), torch.float32), r"got image \(4, 1, 1, 2\) float32 from .* \(4, 1, 2, 2\) float32"),
    ],
)
def test_an_image_that_is_not_expected_is_refused_before_it_is_received(
    image: wire.TensorSpec | None, message: str
) -> None:
    outbox, inbox, _ = link(expected=(wire.TensorSpec((3,), torch.float32),), image=image)
    outbox.send(micro_batch(0, torch.ones(4, 3)).beside(IMAGE))
    with pytest.raises(LinkError, match=message):
        next(iter(inbox))


def test_the_flag_of_an_image_is_in_the_header_and_in_no_other_one() -> None:
    batch = dataclasses.replace(micro_batch(5, torch.ones(4, 3)), split=Split.TRAIN)
    for one in (batch, batch.beside(IMAGE)):
        header = wire.Reader(7).read(
            wire.Writer(0, 7, 8).write(one.as_tick(), one.tensors, one.image is not None).numpy()
        )
        assert (header.layout.has_image, len(header.layout.tensors)) == (one.image is not None, len(one.tensors))
        assert header.labelled.image is None and header.labelled.closes_step
