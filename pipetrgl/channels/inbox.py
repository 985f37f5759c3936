"""The receiving side of a link."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from pipetrgl.channels import wire
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import SENDER
from pipetrgl.channels.codecs import Codec, unpacked
from pipetrgl.channels.link import HEADER_TAG, LOOK_S, Connection, LinkTerms, LostPeerError, Neighbour, lost_if_broken
from pipetrgl.channels.mailbox import Mailbox
from pipetrgl.channels.payload import FOREVER
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch


@final
class LinkInbox:
    """Fills its slots ahead of the stage.

    Args:
        connection: opened; its `next_index` is the first micro-batch that will come.
        terms: of the link.
        alarm: ends every wait.
        neighbour: the sender, should it be replaced.
        expected: shape without rows, and dtype, of each tensor of an activation after decoding; every header is
            compared with them.
        device: of the slots.
        image: as `expected`, of the image that micro-batches may carry as well; None: none ever comes.
    """

    def __init__(
        self,
        connection: Connection,
        terms: LinkTerms,
        alarm: Alarm,
        neighbour: Neighbour,
        expected: Sequence[wire.TensorSpec],
        device: torch.device,
        image: wire.TensorSpec | None = None,
    ) -> None:
        self._connection = connection
        self._terms = terms
        self._alarm = alarm
        self._neighbour = neighbour
        self._expected = _encoded(terms.codec, expected)
        self._with_image = _encoded(terms.codec, [*expected, *([image] if image is not None else [])])
        self._next_index = connection.next_index
        self._words = np.empty(wire.HEADER_WORDS + terms.label_words, dtype=np.int64)
        self._header = torch.from_numpy(self._words)
        self._slots = [_Slot(device) for _ in range(terms.capacity)]
        self._box = Mailbox(terms.capacity, alarm, terms.timeout_s, terms.sender, terms.receiver)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, name=f"from {terms.sender}", daemon=True)
        self._thread.start()

    @property
    def waited_s(self) -> float:
        return self._box.consumer_waited_s

    @property
    def is_late(self) -> bool:
        return self._box.is_late

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        return sum(slot.nbytes for slot in self._slots)

    def __iter__(self) -> Iterator[MicroBatch]:
        slot = 0  # slots are filled and freed in turn, so counting names the slot
        for micro_batch in self._box:
            line = self._connection.line
            line.before_use(slot)
            yield micro_batch
            line.after_use(slot)
            del micro_batch
            slot = (slot + 1) % self._terms.capacity
        self._alarm.check()

    def close(self) -> None:
        self._closed.set()
        self._box.wake()
        if not self._alarm.rang:  # a thread that hangs in a broken link is a daemon, and nobody waits for it
            self._thread.join(timeout=5.0)

    def _receive(self) -> None:
        try:
            slot = 0
            self._box.acquire()
            while (micro_batch := self._take(slot)) is not None:
                self._box.put(micro_batch)
                del micro_batch  # a frame of a waiting thread must not keep the last activation alive
                slot = (slot + 1) % self._terms.capacity
                self._box.acquire()
            self._box.end()
            self._answer_until_closed()
        except BaseException as error:
            self._alarm.ring(error)
        finally:
            self._box.wake()

    def _take(self, slot: int) -> MicroBatch | None:
        """The next micro-batch, from whichever worker is the sender; None at the end of the stream."""
        while True:
            try:
                return self._take_from(self._connection, slot)
            except LostPeerError as lost:
                self._connection = self._neighbour.reconnect(lost, self._next_index)

    def _take_from(self, connection: Connection, slot: int) -> MicroBatch | None:
        with lost_if_broken(self._terms.sender):
            connection.group.recv([self._header], SENDER, HEADER_TAG).wait(FOREVER)
        header = wire.read(self._words, self._terms.run_id)
        if header.kind is wire.Kind.END:
            self._next_index += 1
            return None
        self._check(header)
        buffers = self._slots[slot].views(header.tensors)
        with lost_if_broken(self._terms.sender):
            connection.line.fill(slot, buffers)
        with connection.line.decoding(slot):
            micro_batch = unpacked(self._terms.codec, header.labelled, buffers, header.has_image)
        self._next_index += 1
        return micro_batch

    def _answer_until_closed(self) -> None:
        """After the end, a replaced sender must still be told that nothing more is wanted."""
        while not self._closed.wait(LOOK_S):
            if self._neighbour.was_replaced():
                lost = LostPeerError(f"{self._terms.sender} was replaced")
                self._connection = self._neighbour.reconnect(lost, self._next_index)

    def _check(self, header: wire.Header) -> None:
        """Compare shapes, dtypes and order with what this stage expects, before any payload is received."""
        batch, terms = header.labelled, self._terms
        where = f"{terms.receiver}, step {batch.step}"
        if batch.index != self._next_index:
            raise LinkError(f"{where}: got micro-batch {batch.index} from {terms.sender}, expected {self._next_index}")
        if header.codec != terms.codec.code:
            raise LinkError(f"{where}: got codec {header.codec} from {terms.sender}, expected {terms.codec.code}")
        specs = self._with_image if header.has_image else self._expected
        count = len(specs) * terms.codec.num_parts
        if self._expected and len(header.tensors) not in (0, count):  # 0: a tick
            raise LinkError(f"{where}: got {len(header.tensors)} tensors from {terms.sender}, expected {count}")
        for place, (expected, got) in enumerate(zip(specs, header.tensors[:: terms.codec.num_parts], strict=False)):
            want = wire.TensorSpec((batch.num_rows, *expected.shape), expected.dtype)
            if got != want:
                what = "activation" if place < len(self._expected) else "image"
                raise LinkError(
                    f"{where}: got {what} {got} from {terms.sender}, expected {want}; "
                    "the workers were started from different configs"
                )


@final
class _Slot:
    """Reused memory for one micro-batch; grows to the largest that ever came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage: list[Tensor] = []
        self._specs: tuple[wire.TensorSpec, ...] = ()
        self._views: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(storage.numel() for storage in self._storage)

    def views(self, specs: tuple[wire.TensorSpec, ...]) -> tuple[Tensor, ...]:
        """Fresh tensors of these shapes over the slot's memory; the same memory for the same specs."""
        if specs != self._specs:
            self._specs, self._views = specs, self._laid_out(specs)
        # a stage may make what it gets a part of its graph: never the same tensor twice
        return tuple(view.detach() for view in self._views)

    def _laid_out(self, specs: Sequence[wire.TensorSpec]) -> tuple[Tensor, ...]:
        while len(self._storage) < len(specs):
            self._storage.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        views = []
        for position, spec in enumerate(specs):
            size = math.prod(spec.shape) * spec.dtype.itemsize
            if self._storage[position].numel() < size:
                self._storage[position] = torch.empty(size, dtype=torch.uint8, device=self._device)
            views.append(self._storage[position][:size].view(spec.dtype).view(spec.shape))
        return tuple(views)


def _encoded(codec: Codec, specs: Sequence[wire.TensorSpec]) -> tuple[wire.TensorSpec, ...]:
    """With the dtype that each has on the wire."""
    return tuple(wire.TensorSpec(spec.shape, _wire_dtype(codec, spec.dtype)) for spec in specs)


def _wire_dtype(codec: Codec, dtype: torch.dtype) -> torch.dtype:
    return codec.encode(torch.zeros(1, 1, dtype=dtype))[0].dtype
