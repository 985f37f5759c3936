"""A link: a two-worker process group that carries micro-batches one way, header first.

sender's stage           link's thread                  receiver's thread           receiver's stage
send: header, payload ─▶ waits until both are taken ══▶ free slot? header, payload ─▶ mailbox ─▶ forward, backward
(asynchronous, zero-copy)                               (`capacity` reused slots)     then the slot is free again
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipetrgl.channels import wire
from pipetrgl.channels.alarm import Alarm, wait_until
from pipetrgl.channels.c10d import RECEIVER, SENDER
from pipetrgl.channels.codecs import Codec, decode, encode
from pipetrgl.channels.mailbox import Mailbox
from pipetrgl.channels.payload import FOREVER, PayloadLine
from pipetrgl.errors import LinkError
from pipetrgl.microbatch import MicroBatch

HEADER_TAG = 0


@dataclass(frozen=True)
class LinkTerms:
    """What both sides of a link agreed on at start.

    Attributes:
        run_id: 63 bits, in every header.
        capacity: slots of the receiver.
        codec: of the payload.
        label_words: words of targets and positions in every header.
        timeout_s: longest wait for a micro-batch or a slot.
        sender, receiver: "stage 1 (rank 1)", for messages.
    """

    run_id: int
    capacity: int
    codec: Codec
    label_words: int
    timeout_s: float
    sender: str
    receiver: str


@dataclass(frozen=True)
class _Sending:
    """A micro-batch on its way; keeps its tensors alive."""

    header: Tensor
    header_work: Any
    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]
    posted: Any
    step: int


@final
class LinkOutbox:
    """The sending side: one micro-batch may be on its way while the stage computes the next."""

    def __init__(self, group: ProcessGroup, line: PayloadLine, terms: LinkTerms, alarm: Alarm) -> None:
        self._group = group
        self._line = line
        self._terms = terms
        self._alarm = alarm
        self._condition = threading.Condition()
        self._sending: deque[_Sending] = deque()
        self._closing = False
        self.waited_s = 0.0
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._see_off, name=f"to {terms.receiver}", daemon=True)
        self._thread.start()

    def send(self, micro_batch: MicroBatch) -> None:
        parts = tuple(part.contiguous() for part in encode(self._terms.codec, micro_batch.activation))
        terms = self._terms
        self._wait_for_delivery()
        header = wire.write(micro_batch, parts, terms.codec.code, terms.run_id, terms.label_words)
        self._start(header, parts, micro_batch.step)
        self.sent_bytes += sum(part.nbytes for part in parts)

    def close(self) -> None:
        if self._closing:
            return
        self._wait_for_delivery()
        self._start(wire.write_end(self._terms.run_id, self._terms.label_words), (), step=-1)
        self._wait_for_delivery()
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()

    def _wait_for_delivery(self) -> None:
        with self._condition:
            self.waited_s += wait_until(
                self._condition,
                lambda: not self._sending,
                self._alarm,
                self._terms.timeout_s,
                f"{self._terms.receiver} to take a micro-batch",
            )
        self._alarm.check()

    def _start(self, header: Tensor, parts: tuple[Tensor, ...], step: int) -> None:
        with _lost_if_broken(self._terms.receiver):
            header_work = self._group.send([header], RECEIVER, HEADER_TAG)
            posted = self._line.post(parts)
        versions = tuple(part._version for part in parts)
        with self._condition:
            self._sending.append(_Sending(header, header_work, parts, versions, posted, step))
            self._condition.notify_all()

    def _see_off(self) -> None:
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._sending or self._closing)
                    if not self._sending:
                        return
                    sending = self._sending[0]
                with _lost_if_broken(self._terms.receiver):
                    sending.header_work.wait(FOREVER)
                    self._line.complete(sending.posted)
                if tuple(part._version for part in sending.parts) != sending.versions:
                    raise LinkError(
                        f"step {sending.step}: the activation for {self._terms.receiver} was changed in place while it "
                        "was being sent; the stage's backward pass or a hook must not modify its output"
                    )
                del sending
                with self._condition:
                    self._sending.popleft()
                    self._condition.notify_all()
        except BaseException as error:
            self._alarm.ring(error)


@final
class LinkInbox:
    """The receiving side.

    Args:
        expected: shape without rows, and dtype, of each tensor of an activation after decoding; every header is
            compared with them.
    """

    def __init__(
        self,
        group: ProcessGroup,
        line: PayloadLine,
        terms: LinkTerms,
        alarm: Alarm,
        expected: Sequence[wire.TensorSpec],
        device: torch.device,
    ) -> None:
        self._group = group
        self._line = line
        self._terms = terms
        self._alarm = alarm
        self._expected = tuple(expected)
        self._slots = [_Slot(device) for _ in range(terms.capacity)]
        self._box = Mailbox(terms.capacity, alarm, terms.timeout_s, terms.sender, terms.receiver)
        self._thread = threading.Thread(target=self._receive, name=f"from {terms.sender}", daemon=True)
        self._thread.start()

    @property
    def waited_s(self) -> float:
        return self._box.consumer_waited_s

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        return sum(slot.nbytes for slot in self._slots)

    def __iter__(self) -> Iterator[MicroBatch]:
        slot = 0  # slots are filled and freed in turn, so counting names the slot
        for micro_batch in self._box:
            self._line.before_use(slot)
            yield micro_batch
            self._line.after_use(slot)
            del micro_batch
            slot = (slot + 1) % self._terms.capacity
        self._alarm.check()

    def close(self) -> None:
        self._box.wake()
        if not self._alarm.rang:  # a thread that hangs in a broken link is a daemon, and nobody waits for it
            self._thread.join(timeout=5.0)

    def _receive(self) -> None:
        try:
            lap, index = 0, -1
            while True:
                self._box.acquire()
                words = torch.empty(wire.HEADER_WORDS + self._terms.label_words, dtype=torch.int64)
                with _lost_if_broken(self._terms.sender):
                    self._group.recv([words], SENDER, HEADER_TAG).wait(FOREVER)
                header = wire.read(words, self._terms.run_id)
                if header.kind is wire.Kind.END:
                    return self._box.end()
                index = self._check(header, index)
                buffers = self._slots[lap % self._terms.capacity].views(header.tensors)
                with _lost_if_broken(self._terms.sender):
                    self._line.fill(lap % self._terms.capacity, buffers)
                with self._line.decoding(lap % self._terms.capacity):
                    activation = decode(self._terms.codec, buffers)
                self._box.put(replace(header.labelled, activation=activation))
                lap += 1
                # a frame of a waiting thread must not keep the last activation of another codec alive
                del activation, buffers
        except BaseException as error:
            self._alarm.ring(error)
        finally:
            self._box.wake()

    def _check(self, header: wire.Header, last_index: int) -> int:
        """Compare shapes, dtypes and order with what this stage expects, before any payload is received."""
        batch, terms = header.labelled, self._terms
        where = f"{terms.receiver}, step {batch.step}"
        if last_index >= 0 and batch.index != last_index + 1:
            raise LinkError(f"{where}: got micro-batch {batch.index} after {last_index} from {terms.sender}")
        if header.codec != terms.codec.code:
            raise LinkError(f"{where}: got codec {header.codec} from {terms.sender}, expected {terms.codec.code}")
        if self._expected and len(header.tensors) not in (0, len(self._expected) * terms.codec.num_parts):  # 0: a tick
            count = len(self._expected) * terms.codec.num_parts
            raise LinkError(f"{where}: got {len(header.tensors)} tensors from {terms.sender}, expected {count}")
        for expected, got in zip(self._expected, header.tensors[:: terms.codec.num_parts], strict=False):
            want = wire.TensorSpec((batch.num_rows, *expected.shape), _wire_dtype(terms.codec, expected.dtype))
            if got != want:
                raise LinkError(
                    f"{where}: got activation {got} from {terms.sender}, expected {want}; "
                    "the workers were started from different configs"
                )
        return batch.index


@final
class _Slot:
    """Reused memory for one micro-batch; grows to the largest that ever came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(storage.numel() for storage in self._storage)

    def views(self, specs: Sequence[wire.TensorSpec]) -> tuple[Tensor, ...]:
        while len(self._storage) < len(specs):
            self._storage.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        views = []
        for position, spec in enumerate(specs):
            size = math.prod(spec.shape) * spec.dtype.itemsize
            if self._storage[position].numel() < size:
                self._storage[position] = torch.empty(size, dtype=torch.uint8, device=self._device)
            views.append(self._storage[position][:size].view(spec.dtype).view(spec.shape))
        return tuple(views)


def _wire_dtype(codec: Codec, dtype: torch.dtype) -> torch.dtype:
    return codec.encode(torch.zeros(1, 1, dtype=dtype))[0].dtype


@contextlib.contextmanager
def _lost_if_broken(peer: str) -> Iterator[None]:
    """Around calls of a process group, whose every failure is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(f"the link to {peer} broke: {str(error).splitlines()[0]}") from error


class LostPeerError(LinkError):
    """A neighbour went away; usually the consequence of an error that the neighbour reports itself."""
