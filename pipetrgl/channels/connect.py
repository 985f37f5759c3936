"""Connecting: neighbours compare what they are, open their link in rank order and align their clocks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import RECEIVER, SENDER, PrefixStore, gloo_pair, nccl_pair
from pipetrgl.channels.link import LinkInbox, LinkOutbox, LinkTerms
from pipetrgl.channels.payload import FOREVER, GlooLine, NcclLine, PayloadLine
from pipetrgl.channels.wire import PROTOCOL, TensorSpec
from pipetrgl.errors import LaunchError, LinkError

_CLOCK_TAG = 9
_ROUNDS = 5


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself on the board before any link is opened; `config` is the config's hash."""

    rank: int
    name: str
    host: str
    device: str
    config: str
    protocol: int = PROTOCOL

    def post(self, board: Board) -> None:
        board.post(f"worker/{self.rank}", self.__dict__)


@final
class Connector:
    """Opens this worker's links, upstream first, so that links come up in rank order.

    Args:
        board: of the run.
        mine: this worker's hello, posted already.
        address: of this machine as the others reach it; see `address_towards`.
        generation: of the links; a replaced worker's are one higher.
        timeout_s: how long to wait for a neighbour.
        alarm: ends every wait.
    """

    def __init__(
        self, board: Board, mine: Hello, address: str, timeout_s: float, alarm: Alarm, generation: int = 0
    ) -> None:
        self._board = board
        self._store = board.store.clone()  # a group waits inside the store, which would hold up the board's calls
        self._mine = mine
        self._address = address
        self._timeout_s = timeout_s
        self._alarm = alarm
        self._generation = generation
        self.clock_offset_s = 0.0
        """Add to this process's `time.perf_counter()` to get rank 0's."""

    def inbox(self, peer: int, terms: LinkTerms, expected: Sequence[TensorSpec], device: torch.device) -> LinkInbox:
        """The receiving side of the link from `peer`.

        Raises:
            LaunchError: the peer runs another config or version.
            LinkError: the peer did not come in time.
        """
        group = self._open(peer, RECEIVER, terms.sender)
        self.clock_offset_s = self._follow_clock(group, terms.sender)
        line = self._line(group, peer, SENDER, RECEIVER, terms, device)
        return LinkInbox(group, line, terms, self._alarm, expected, device)

    def outbox(self, peer: int, terms: LinkTerms, device: torch.device) -> LinkOutbox:
        """The sending side of the link to `peer`; raises as `inbox`."""
        group = self._open(peer, SENDER, terms.receiver)
        self._lead_clock(group, terms.receiver)
        line = self._line(group, peer, RECEIVER, SENDER, terms, device)
        return LinkOutbox(group, line, terms, self._alarm)

    def _open(self, peer: int, side: int, name: str) -> ProcessGroup:
        hello = self._board.read(
            f"worker/{peer}", self._timeout_s, self._alarm, f"{name} to start; does it run, and reach the store?"
        )
        for field, meaning in (("protocol", "wire protocol"), ("config", "config"), ("device", "device")):
            theirs, ours = hello[field], getattr(self._mine, field)
            if theirs != ours:
                raise LaunchError(
                    f"{self._mine.name} on {self._mine.host} has {meaning} {ours}, but {hello['name']} on "
                    f"{hello['host']} has {theirs}; all workers must be started with the same version and config"
                )
        store = PrefixStore(self._prefix(peer, side), self._store)
        group: list[ProcessGroup] = []

        def build() -> None:
            group.append(gloo_pair(store, side, self._address, self._timeout_s))

        self._finish(build, f"{name} on {hello['host']} to open the link from {self._mine.host} ({self._address})")
        return group[0]

    def _prefix(self, peer: int, side: int) -> str:
        sender, receiver = (self._mine.rank, peer) if side == SENDER else (peer, self._mine.rank)
        return f"link/{sender}-{receiver}/g{self._generation}"

    def _line(
        self, group: ProcessGroup, peer: int, other: int, side: int, terms: LinkTerms, device: torch.device
    ) -> PayloadLine:
        if device.type == "cpu":
            return GlooLine(group, other)
        # One group an edge: unbatched point-to-point on a shared group would be serialised.
        store = PrefixStore(self._prefix(peer, side) + "/nccl", self._store)
        return NcclLine(nccl_pair(store, side, device), other, terms.capacity, device)

    def _lead_clock(self, group: ProcessGroup, name: str) -> None:
        """Ping, and tell the receiver how far its clock is from rank 0's: the reading of the shortest round trip."""
        best = (float("inf"), 0.0)
        for _ in range(_ROUNDS):
            theirs = torch.zeros(1, dtype=torch.float64)
            start = time.perf_counter()
            self._exchange(group, [_now()], theirs, RECEIVER, name)
            end = time.perf_counter()
            middle = (start + end) / 2 + self.clock_offset_s
            best = min(best, (end - start, middle - float(theirs)))
        offset = torch.tensor([best[1]], dtype=torch.float64)
        self._finish(lambda: group.send([offset], RECEIVER, _CLOCK_TAG).wait(FOREVER), f"a ping to {name}")

    def _follow_clock(self, group: ProcessGroup, name: str) -> float:
        ping, offset = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

        def answer() -> None:
            for _ in range(_ROUNDS):
                group.recv([ping], SENDER, _CLOCK_TAG).wait(FOREVER)
                group.send([_now()], SENDER, _CLOCK_TAG).wait(FOREVER)
            group.recv([offset], SENDER, _CLOCK_TAG).wait(FOREVER)

        self._finish(answer, f"a ping from {name}")
        return float(offset)

    def _exchange(self, group: ProcessGroup, out: list[Tensor], into: Tensor, peer: int, name: str) -> None:
        def ping() -> None:
            group.send(out, peer, _CLOCK_TAG).wait(FOREVER)
            group.recv([into], peer, _CLOCK_TAG).wait(FOREVER)

        self._finish(ping, f"a ping to {name}")

    def _finish(self, blocking: Any, what: str) -> None:
        """Run a call that cannot be interrupted in a thread, and wait for it with the alarm and a deadline."""
        failures: list[BaseException] = []

        def call() -> None:
            try:
                blocking()
            except RuntimeError as error:
                failures.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        deadline = time.monotonic() + self._timeout_s
        while thread.is_alive():
            thread.join(0.02)
            self._alarm.check()
            if time.monotonic() > deadline:
                raise LinkError(f"waited {self._timeout_s:.0f} s for {what}")
        if failures:
            raise LinkError(f"failed while waiting for {what}: {failures[0]}") from failures[0]


def address_towards(host: str, port: int) -> str:
    """This machine's address as seen from `host`: the one its route to `host` uses. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _now() -> Tensor:
    return torch.tensor([time.perf_counter()], dtype=torch.float64)
