"""How payload tensors cross a link: the device's own line, gloo for CPU and NCCL for CUDA, behind one contract.

The header of a micro-batch always travels on the CPU line first, and is taken only when the receiver has a free slot.
So a delivered header is a credit, and these lines never send without one.

    receiver, with a free slot: ready for the header, and for a payload of the largest size ─▶ sender
    sender: header, payload ─▶ receiver: one thread wakes, once

Each payload tensor of a micro-batch has a tag of its own, so that a receive that was posted ahead for one that this
micro-batch lacks, as a tick does, waits for the next that has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# An expired wait would kill the connection for good, so gloo waits practically for ever: heartbeats decide who is dead.
FOREVER = timedelta(days=365)
_PAYLOAD_TAG = 16  # of the first payload tensor, then one more for each


class PayloadLine(Protocol):
    """One direction of one link; `ready`, `before_use`, `after_use` run in the stage's thread, others in the link's.

    `buffers` are those of the payload tensors in their order.
    """

    def ready(self) -> Any:
        """What the stage has queued until now: `post` waits for it."""

    def post(self, parts: Sequence[Tensor], ready: Any) -> Any:
        """Make `parts` ready to go, right after the header was posted; returns what `complete` needs."""

    def complete(self, header: Any, posted: Any) -> None:
        """Return when the header, work on its way, was taken and `parts` may be freed."""

    def expect(self, buffers: Sequence[Tensor]) -> None:
        """Before a header has come: what follows it will be received into these, each as large as it can get."""

    def fill(self, slot: int, buffers: Sequence[Tensor]) -> None:
        """Receive into the buffers of a slot, or wait for what was expected in the same memory."""

    def decoding(self, slot: int) -> AbstractContextManager[None]:
        """Around the decoding of a filled slot, in the link's thread."""

    def before_use(self, slot: int) -> None:
        """Order the stage's computation after `fill` and decoding."""

    def after_use(self, slot: int) -> None:
        """The stage has queued its last use of the slot."""


@final
class GlooLine:
    """CPU tensors. gloo sends are rendezvous: posting at once takes no memory there and saves a round trip."""

    def __init__(self, group: ProcessGroup, peer: int) -> None:
        self._group = group
        self._peer = peer
        self._expected: dict[int, Any] = {}  # place in the payload -> work

    def ready(self) -> Any:
        return None  # all done

    def post(self, parts: Sequence[Tensor], ready: Any) -> Any:
        return [self._group.send([part], self._peer, _PAYLOAD_TAG + place) for place, part in enumerate(parts)]

    def complete(self, header: Any, posted: Any) -> None:
        for work in (*reversed(posted), header):  # the last first: once it is done the others are, and wake nobody
            work.wait(FOREVER)

    def expect(self, buffers: Sequence[Tensor]) -> None:
        for place, buffer in enumerate(buffers):
            if place not in self._expected:
                self._expected[place] = self._receive(place, buffer)

    def fill(self, slot: int, buffers: Sequence[Tensor]) -> None:
        works = [
            self._expected.pop(place) if place in self._expected else self._receive(place, buffer)
            for place, buffer in enumerate(buffers)
        ]
        for work in works:
            work.wait(FOREVER)

    def _receive(self, place: int, buffer: Tensor) -> Any:
        return self._group.recv([buffer], self._peer, _PAYLOAD_TAG + place)

    def decoding(self, slot: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def before_use(self, slot: int) -> None:
        pass

    def after_use(self, slot: int) -> None:
        pass


@final
class NcclLine:
    """CUDA tensors on a side stream of this edge. Written from documentation; never run on a GPU yet (docs/gpu.md).

    Ordering, sender: the stage's stream ─ event ready ─▶ side stream: send ─▶ event sent, awaited by the link's thread
    before the tensor is let go. Receiver: side stream: [wait until the slot's last use is over] recv ─ event filled ─▶
    the stage's stream. The stage's own thread never blocks on the device.
    """

    def __init__(self, group: ProcessGroup, peer: int, capacity: int, device: torch.device) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._filled = [_event() for _ in range(capacity)]
        self._used = [_event() for _ in range(capacity)]

    def ready(self) -> Any:
        ready = _event()
        ready.record(torch.cuda.current_stream(self._device))
        return ready

    def post(self, parts: Sequence[Tensor], ready: Any) -> Any:
        return parts, ready

    def complete(self, header: Any, posted: Any) -> None:
        header.wait(FOREVER)
        parts, ready = posted
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for part in parts:
                self._group.send([part], self._peer, _PAYLOAD_TAG).wait()  # NCCL keeps the order and knows no tags
            sent = _event()
            sent.record(self._stream)
        sent.synchronize()  # in the link's thread, so `parts` outlive the copy without record_stream

    def expect(self, buffers: Sequence[Tensor]) -> None:
        """Nothing: a receive that waits for a tensor which may not come would hold the stream."""

    def fill(self, slot: int, buffers: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])  # an event never recorded is complete: the first lap passes
            # the buffers may just have been allocated from memory that kernels of the default stream still read
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for buffer in buffers:
                self._group.recv([buffer], self._peer, _PAYLOAD_TAG).wait()
            self._filled[slot].record(self._stream)

    @contextlib.contextmanager
    def decoding(self, slot: int) -> Iterator[None]:
        with torch.cuda.stream(self._stream):  # the receive is only queued there: decode behind it, on the same stream
            yield
            self._filled[slot].record(self._stream)

    def before_use(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def after_use(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self._device))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
