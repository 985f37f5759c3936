"""A link: a two-worker process group that carries micro-batches one way, header first.

sender's stage           outbox's thread                inbox's thread              receiver's stage
send: header, payload ─▶ waits until both are taken ══▶ free slot? header, payload ─▶ mailbox ─▶ forward, backward
(asynchronous, zero-copy)                               (`capacity` reused slots)     then the slot is free again

The worker at the other end may be replaced while the run goes on: the link is then opened again, one generation
higher, and the receiver says which micro-batch it wants next. The sender sends again what the new receiver lacks, or
drops what the old receiver already has.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, final

from torch.distributed import ProcessGroup

from pipetrgl.channels.codecs import Codec
from pipetrgl.channels.payload import PayloadLine
from pipetrgl.errors import LinkError

HEADER_TAG = 0
LOOK_S = 0.25
"""How often an idle link looks whether its neighbour was replaced, of which the heartbeat learns as often."""


@final
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


@final
@dataclass(frozen=True)
class Connection:
    """A link while both of its workers live.

    Attributes:
        group: of the two, for headers.
        line: for payload.
        next_index: the micro-batch that the receiver wants next.
        rooms: bytes that the receiver has ready at most for each payload tensor; gloo ends a process that gets more.
            Empty: it learns the size from the header first.
    """

    group: ProcessGroup
    line: PayloadLine
    next_index: int
    rooms: tuple[int, ...] = ()


class Neighbour(Protocol):
    """The worker at the other end of a link, which may be replaced."""

    def was_replaced(self) -> bool:
        """Whether a newer worker has taken its place; does not block."""

    def reconnect(self, lost: LostPeerError, next_index: int) -> Connection:
        """Wait for its replacement and open the link again.

        Args:
            lost: why; raised again if there will be no replacement.
            next_index: what this side, if it is the receiver, wants next.
        """


@final
class Irreplaceable:
    """A neighbour that nobody replaces: where it is lost, the run ends."""

    def was_replaced(self) -> bool:
        return False

    def reconnect(self, lost: LostPeerError, next_index: int) -> Connection:
        raise lost


class LostPeerError(LinkError):
    """A neighbour went away; usually the consequence of an error that the neighbour reports itself."""


@final
class lost_if_broken:  # noqa: N801  # read as a statement
    """Around calls of a process group, whose every failure is a RuntimeError."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            raise LostPeerError(f"the link to {self._peer} broke: {str(error).splitlines()[0]}") from error
