"""A peer: the worker at the other end of a link, met through the board, and met again where it was replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import (
    RECEIVER,
    SENDER,
    PrefixStore,
    Store,
    default_group,
    gloo_group,
    gloo_pair,
    nccl_group,
    nccl_pair,
)
from pipetrgl.channels.link import Connection, LinkTerms, LostPeerError
from pipetrgl.channels.payload import FOREVER, GlooLine, NcclLine, PayloadLine
from pipetrgl.channels.wire import MAX_TENSORS, PROTOCOL
from pipetrgl.errors import LaunchError, LinkError

_CLOCK_TAG, _WANTED_TAG = 9, 8
_ROUNDS = 5
_POLL_S = 0.02


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself on the board before any link is opened.

    Attributes:
        config: the config's hash.
        incarnation: 0 for the first worker at this rank, one more for each that replaced it.
    """

    rank: int
    name: str
    host: str
    device: str
    config: str
    incarnation: int = 0
    protocol: int = PROTOCOL

    def post(self, board: Board) -> None:
        board.post(f"worker/{self.rank}", self.__dict__)


@final
@dataclass
class Clock:
    """`offset_s` is added to this process's `time.perf_counter()` to give rank 0's."""

    offset_s: float = 0.0


@final
@dataclass(frozen=True)
class Site:
    """This side of all links of a worker.

    Attributes:
        board: of the run.
        mine: this worker's hello, posted already.
        address: of this machine as the others reach it; see `connect.address_towards`.
        timeout_s: how long to wait for a neighbour.
        alarm: ends every wait.
        replacement_s: how long to wait for word that a lost neighbour is replaced; None: nobody replaces any.
    """

    board: Board
    mine: Hello
    address: str
    timeout_s: float
    alarm: Alarm
    replacement_s: float | None = None
    clock: Clock = field(default_factory=Clock)


def announce_replacement(board: Board, rank: int, incarnation: int) -> None:
    """Tell the neighbours of `rank`, whose links are broken, that a new worker is on its way."""
    board.post(f"replacing/{rank}", {"incarnation": incarnation})


def announce_recovery(board: Board, under_way: bool) -> None:
    """Tell all workers whether some stage is being replaced, and deadlines have to wait for that."""
    board.post("recovering", under_way)


@final
class Peer:
    """Opens one link, and opens it again, under a prefix of its own, to each worker that replaces the peer.

    Args:
        site: this side.
        rank: the peer's.
        side: SENDER or RECEIVER, this worker's.
        terms: of the link.
        device: of the payload.
        rooms: of this side, if it is the receiver; see `Connection`.
    """

    def __init__(
        self, site: Site, rank: int, side: int, terms: LinkTerms, device: torch.device, rooms: Sequence[int] = ()
    ) -> None:
        self._site = site
        self._rank = rank
        self._side = side
        self._terms = terms
        self._device = device
        self._rooms = tuple(rooms)
        self._name = terms.receiver if side == SENDER else terms.sender
        self._open_to = -1  # incarnation of the worker that the link was last opened to
        self._newest = 0  # incarnation that is known to be on its way
        self.look(site.board)

    def connect(self, next_index: int) -> Connection:
        """Open the link to the newest worker at the peer's rank.

        Args:
            next_index: what this side wants first, if it is the receiver.
        Raises:
            LaunchError: it runs another config or version.
            LinkError: it did not come in time.
        """
        while True:
            try:
                return self._open(next_index)
            except _SupersededError:
                continue

    def was_replaced(self) -> bool:
        return self._newest > self._open_to

    def reconnect(self, lost: LostPeerError, next_index: int) -> Connection:
        assert self._site.replacement_s is not None
        deadline = time.monotonic() + self._site.replacement_s
        while not self.was_replaced():
            self._site.alarm.check()
            if time.monotonic() > deadline:
                raise lost
            time.sleep(_POLL_S)
        return self.connect(next_index)

    def look(self, board: Board) -> None:
        """Notice that the peer is being replaced."""
        if (note := board.find(f"replacing/{self._rank}")) is not None:
            self._newest = note["incarnation"]

    def _open(self, next_index: int) -> Connection:
        hello = self._await_hello()
        mine = self._site.mine
        _require_equal(mine, hello)
        self._open_to = hello["incarnation"]
        ends = (mine, hello) if self._side == SENDER else (hello, mine)
        ranks, incarnations = zip(*(_place(end) for end in ends), strict=True)
        prefix = f"link/{ranks[0]}-{ranks[1]}/g{incarnations[0]}.{incarnations[1]}"
        # A group waits inside its store, and one that is given up keeps waiting: it must not hold up the board's calls.
        store = PrefixStore(prefix, self._site.board.store.clone())
        what = f"{self._name} on {hello['host']} to open the link from {mine.host} ({self._site.address})"
        group = self._finish(lambda: gloo_pair(store, self._side, self._site.address, self._site.timeout_s), what)
        if self._side == SENDER:
            self._lead_clock(group)
        else:
            self._follow_clock(group)
        wanted, rooms = self._agree(group, next_index)
        return Connection(group, self._line(group, store), wanted, rooms)

    def _await_hello(self) -> dict[str, Any]:
        what = f"{self._name} to start; does it run, and reach the store?"
        deadline = time.monotonic() + self._site.timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            hello: dict[str, Any] = self._site.board.read(f"worker/{self._rank}", left_s, self._site.alarm, what)
            if hello["incarnation"] >= self._newest:
                return hello
            self._site.alarm.check()
            if left_s == 0:
                raise LinkError(f"waited {self._site.timeout_s:.0f} s for {what}")
            time.sleep(_POLL_S)

    def _agree(self, group: ProcessGroup, next_index: int) -> tuple[int, tuple[int, ...]]:
        """The receiver says what it wants next, and its rooms; both sides return them."""
        words = [next_index, *self._rooms]
        wanted = torch.tensor([*words, *[-1] * (1 + MAX_TENSORS - len(words))])
        what = f"word from {self._name} about where the stream goes on"
        if self._side == RECEIVER:
            self._finish(lambda: group.send([wanted], SENDER, _WANTED_TAG).wait(FOREVER), what)
        else:
            self._finish(lambda: group.recv([wanted], RECEIVER, _WANTED_TAG).wait(FOREVER), what)
        wanted_index, *rooms = wanted.tolist()
        return wanted_index, tuple(room for room in rooms if room >= 0)

    def _line(self, group: ProcessGroup, store: Store) -> PayloadLine:
        other = 1 - self._side
        if self._device.type == "cpu":
            return GlooLine(group, other)
        # One group an edge: unbatched point-to-point on a shared group would be serialised.
        pair = nccl_pair(PrefixStore("nccl", store), self._side, self._device)
        return NcclLine(pair, other, self._terms.capacity, self._device)

    def _lead_clock(self, group: ProcessGroup) -> None:
        """Ping, and tell the receiver how far its clock is from rank 0's: the reading of the shortest round trip."""

        def ping() -> None:
            best = (float("inf"), 0.0)
            theirs = torch.zeros(1, dtype=torch.float64)
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                _exchange(group, theirs)
                end = time.perf_counter()
                middle = (start + end) / 2 + self._site.clock.offset_s
                best = min(best, (end - start, middle - float(theirs)))
            offset = torch.tensor([best[1]], dtype=torch.float64)
            group.send([offset], RECEIVER, _CLOCK_TAG).wait(FOREVER)

        # all in one thread: to start one for each ping would be a part of the round trip
        self._finish(ping, f"a ping to {self._name}")

    def _follow_clock(self, group: ProcessGroup) -> None:
        ping, offset = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

        def answer() -> None:
            for _ in range(_ROUNDS):
                group.recv([ping], SENDER, _CLOCK_TAG).wait(FOREVER)
                group.send([_now()], SENDER, _CLOCK_TAG).wait(FOREVER)
            group.recv([offset], SENDER, _CLOCK_TAG).wait(FOREVER)

        self._finish(answer, f"a ping from {self._name}")
        self._site.clock.offset_s = float(offset)

    def _finish(self, blocking: Callable[[], Any], what: str) -> Any:
        """As `_finished`; the peer may also be replaced meanwhile, and will then not answer any more.

        Raises:
            _SupersededError: it was.
        """

        def look() -> None:
            if self.was_replaced():
                raise _SupersededError

        return _finished(self._site, blocking, what, look)


def open_group(
    site: Site, ranks: Sequence[int], replica: int, device: torch.device, name: str
) -> tuple[ProcessGroup, ProcessGroup | None]:
    """The replica group of the workers at `ranks`, of which this is the one at place `replica`.

    Returns:
        The group on the CPU, and the one of the GPUs, if `device` is one.
    Raises:
        LaunchError: one of them runs another config or version.
        LinkError: one did not come in time.
    """
    for rank in ranks:
        what = f"{name}: the worker of rank {rank} to start; does it run, and reach the store?"
        _require_equal(site.mine, site.board.read(f"worker/{rank}", site.timeout_s, site.alarm, what))
    store = PrefixStore("group/" + "-".join(map(str, ranks)), site.board.store.clone())
    size = len(ranks)
    what = f"{name} to open their group"
    group = _finished(site, lambda: gloo_group(store, replica, size, site.address, site.timeout_s), what)
    if device.type == "cpu":
        return group, None
    nccl = PrefixStore("nccl", store)
    return group, _finished(site, lambda: nccl_group(nccl, replica, size, device), what)


def open_default_group(site: Site, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    """Torch's default group of all workers, which its pipeline schedules need; raises as `open_group`.

    Args:
        timeout_s: the longest wait for one message.
    """
    store = PrefixStore("everyone", site.board.store.clone())
    what = "all workers to open the group that they share"
    return cast(ProcessGroup, _finished(site, lambda: default_group(store, rank, size, timeout_s), what))


def _finished(site: Site, blocking: Callable[[], Any], what: str, look: Callable[[], None] = lambda: None) -> Any:
    """Run a call that cannot be interrupted in a thread; wait for it with the alarm, a deadline, and `look`, which may
    raise."""
    results: list[Any] = []
    failures: list[RuntimeError] = []

    def call() -> None:
        try:
            results.append(blocking())
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    deadline = time.monotonic() + site.timeout_s
    while thread.is_alive():
        thread.join(_POLL_S)
        site.alarm.check()
        look()
        if time.monotonic() > deadline:
            raise LinkError(f"waited {site.timeout_s:.0f} s for {what}")
    if failures:
        raise LostPeerError(f"failed while waiting for {what}: {failures[0]}") from failures[0]
    return results[0]


class _SupersededError(Exception):
    """The worker that a link was being opened to has been replaced."""


def _require_equal(mine: Hello, hello: dict[str, Any]) -> None:
    for name, meaning in (("protocol", "wire protocol"), ("config", "config"), ("device", "device")):
        theirs, ours = hello[name], getattr(mine, name)
        if theirs != ours:
            raise LaunchError(
                f"{mine.name} on {mine.host} has {meaning} {ours}, but {hello['name']} on "
                f"{hello['host']} has {theirs}; all workers must be started with the same version and config"
            )


def _place(end: Hello | dict[str, Any]) -> tuple[int, int]:
    return (end.rank, end.incarnation) if isinstance(end, Hello) else (end["rank"], end["incarnation"])


def _exchange(group: ProcessGroup, theirs: Tensor) -> None:
    group.send([_now()], RECEIVER, _CLOCK_TAG).wait(FOREVER)
    group.recv([theirs], RECEIVER, _CLOCK_TAG).wait(FOREVER)


def _now() -> Tensor:
    return torch.tensor([time.perf_counter()], dtype=torch.float64)
