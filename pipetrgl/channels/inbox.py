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
        connection: opened; its `next_index` is the first micro-batch that will come. Later ones have the same `rooms`.
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
        self._reader = wire.Reader(terms.run_id)
        self._accepted: wire.Layout | None = None
        rooms = (*connection.rooms, *[0] * (wire.MAX_TENSORS - len(connection.rooms)))
        self._rings = [_Ring(terms.capacity, device, room) for room in rooms]
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
        return sum(ring.nbytes for ring in self._rings)

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
            coming = connection.group.recv([self._header], SENDER, HEADER_TAG)
            connection.line.expect(self._ready())
            coming.wait(FOREVER)
        header = self._reader.read(self._words)
        if header.kind is wire.Kind.END:
            self._next_index += 1
            return None
        self._check(header)
        rings = self._rings[: len(header.layout.tensors)]
        buffers = tuple(ring.view(spec) for ring, spec in zip(rings, header.layout.tensors, strict=True))
        with lost_if_broken(self._terms.sender):
            connection.line.fill(slot, buffers)
        for ring in rings:  # only now: what breaks off comes again, into the same memory
            ring.pass_on()
        with connection.line.decoding(slot):
            micro_batch = unpacked(self._terms.codec, header.labelled, buffers, header.layout.has_image)
        self._next_index += 1
        return micro_batch

    def _ready(self) -> list[Tensor]:
        """Buffers of the first payload tensors: of as many as have come before."""
        buffers: list[Tensor] = []
        for ring in self._rings:
            if (buffer := ring.ready()) is None:
                break
            buffers.append(buffer)
        return buffers

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
        layout = header.layout
        if layout is self._accepted:
            return
        if layout.codec != terms.codec.code:
            raise LinkError(f"{where}: got codec {layout.codec} from {terms.sender}, expected {terms.codec.code}")
        specs = self._with_image if layout.has_image else self._expected
        count = len(specs) * terms.codec.num_parts
        if self._expected and len(layout.tensors) not in (0, count):  # 0: a tick
            raise LinkError(f"{where}: got {len(layout.tensors)} tensors from {terms.sender}, expected {count}")
        for place, (expected, got) in enumerate(zip(specs, layout.tensors[:: terms.codec.num_parts], strict=False)):
            want = wire.TensorSpec((batch.num_rows, *expected.shape), expected.dtype)
            if got != want:
                what = "activation" if place < len(self._expected) else "image"
                raise LinkError(
                    f"{where}: got {what} {got} from {terms.sender}, expected {want}; "
                    "the workers were started from different configs"
                )
        self._accepted = layout


@final
class _Ring:
    """Reused memory for one payload tensor of each micro-batch: `capacity` buffers, filled in turn.

    A micro-batch without that tensor, as a tick, leaves the turn to the next one. So a buffer was last used at least
    `capacity` micro-batches ago, and is free when the slot of this micro-batch is.

    Args:
        room: bytes of the largest tensor that can come; 0: unknown, buffers grow.
    """

    def __init__(self, capacity: int, device: torch.device, room: int) -> None:
        self._buffers = [_Buffer(device) for _ in range(capacity)]
        self._room = room
        self._turn = 0
        self._used = False

    @property
    def nbytes(self) -> int:
        return sum(buffer.storage.numel() for buffer in self._buffers)

    def ready(self) -> Tensor | None:
        """The whole buffer whose turn it is; None before a first tensor has come, or where its room is not known."""
        if not self._used or self._room == 0:
            return None
        return self._buffers[self._turn].with_room(self._room)

    def view(self, spec: wire.TensorSpec) -> Tensor:
        """A fresh tensor over the buffer whose turn it is."""
        return self._buffers[self._turn].view(spec, self._room)

    def pass_on(self) -> None:
        """The buffer whose turn it was is filled."""
        self._used, self._turn = True, (self._turn + 1) % len(self._buffers)


@final
class _Buffer:
    """The same memory for the same size; grows to the largest that ever came."""

    def __init__(self, device: torch.device) -> None:
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)
        self._spec: wire.TensorSpec | None = None
        self._view = self.storage

    def with_room(self, num_bytes: int) -> Tensor:
        if self.storage.numel() < num_bytes:
            self.storage = torch.empty(num_bytes, dtype=torch.uint8, device=self.storage.device)
            self._spec = None
        return self.storage

    def view(self, spec: wire.TensorSpec, room: int) -> Tensor:
        size = math.prod(spec.shape) * spec.dtype.itemsize
        storage = self.with_room(max(size, room))
        if spec != self._spec:
            self._spec, self._view = spec, storage[:size].view(spec.dtype).view(spec.shape)
        return self._view.detach()  # a stage may make what it gets a part of its graph: never the same tensor twice


def _encoded(codec: Codec, specs: Sequence[wire.TensorSpec]) -> tuple[wire.TensorSpec, ...]:
    """With the dtype that each has on the wire."""
    return tuple(wire.TensorSpec(spec.shape, _wire_dtype(codec, spec.dtype)) for spec in specs)


def _wire_dtype(codec: Codec, dtype: torch.dtype) -> torch.dtype:
    return codec.encode(torch.zeros(1, 1, dtype=dtype))[0].dtype
