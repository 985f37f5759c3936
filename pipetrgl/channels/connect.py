"""Connecting: opens a worker's links to its neighbours, and looks after them while the run goes on."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import RECEIVER, SENDER
from pipetrgl.channels.inbox import LinkInbox
from pipetrgl.channels.link import Irreplaceable, LinkTerms, Neighbour
from pipetrgl.channels.outbox import LinkOutbox
from pipetrgl.channels.peer import Peer, Site, open_default_group, open_group
from pipetrgl.channels.replay import ReplayLog
from pipetrgl.channels.replicas import LinkGroup
from pipetrgl.channels.wire import TensorSpec


@final
class Connector:
    """Opens this worker's links, upstream first, so that links come up in rank order.

    Args:
        site: this worker's side of them.
        log_bytes: of each outbox's replay log.
    """

    def __init__(self, site: Site, log_bytes: int) -> None:
        self._site = site
        self._log_bytes = log_bytes if site.replacement_s is not None else 0
        self._peers: list[Peer] = []
        self._inboxes: list[LinkInbox] = []
        self._outboxes: list[tuple[int, LinkOutbox]] = []
        self._default: ProcessGroup | None = None

    @property
    def clock_offset_s(self) -> float:
        return self._site.clock.offset_s

    def replicas(
        self, ranks: Sequence[int], replica: int, device: torch.device, timeout_s: float, name: str
    ) -> LinkGroup:
        """This worker's side of its replica group.

        Args:
            ranks: of the group's workers, in order; `replica` is this one's place among them.
            timeout_s: the longest wait for a sum.
            name: for messages.
        """
        group, device_group = open_group(self._site, ranks, replica, device, name)
        return LinkGroup(group, device_group, replica, len(ranks), self._site.alarm, timeout_s, name)

    def everyone(self, rank: int, size: int, timeout_s: float) -> ProcessGroup:
        """Torch's default group of all workers, `timeout_s` for each message; raises as `inbox`."""
        self._default = open_default_group(self._site, rank, size, timeout_s)
        return self._default

    def inbox(
        self,
        rank: int,
        terms: LinkTerms,
        expected: Sequence[TensorSpec],
        device: torch.device,
        next_index: int,
        image: TensorSpec | None = None,
        rooms: Sequence[int] = (),
    ) -> LinkInbox:
        """The receiving side of the link from `rank`, which is asked for micro-batch `next_index` first.

        Args:
            rooms: see `Connection`.
        Raises:
            LaunchError: that worker runs another config or version.
            LinkError: it did not come in time.
        """
        peer = self._peer(rank, RECEIVER, terms, device, rooms)
        connection = peer.connect(next_index)
        inbox = LinkInbox(connection, terms, self._site.alarm, self._neighbour(peer), expected, device, image)
        self._inboxes.append(inbox)
        return inbox

    def outbox(self, rank: int, terms: LinkTerms, device: torch.device) -> LinkOutbox:
        """The sending side of the link to `rank`; raises as `inbox`."""
        peer = self._peer(rank, SENDER, terms, device)
        connection, log = peer.connect(next_index=0), ReplayLog(self._log_bytes)
        outbox = LinkOutbox(connection, terms, self._site.alarm, self._neighbour(peer), log)
        self._outboxes.append((rank, outbox))
        return outbox

    def look(self, board: Board) -> None:
        """Notice replacements, and what neighbours have made durable; the heartbeat's thread calls it.

        Args:
            board: the heartbeat's own client of the store.
        """
        if self._site.replacement_s is None:
            return  # nobody is replaced: there is nothing to notice
        self._site.alarm.paused = bool(board.find("recovering"))
        for peer in self._peers:
            peer.look(board)
        for rank, outbox in self._outboxes:
            if (index := durable_index(board, rank)) is not None:
                outbox.trim(index)

    def close(self) -> None:
        """End the links' threads."""
        for _, outbox in self._outboxes:
            outbox.let_go()
        for inbox in self._inboxes:
            inbox.close()
        if self._default is not None:
            dist.destroy_process_group(self._default)

    def _peer(self, rank: int, side: int, terms: LinkTerms, device: torch.device, rooms: Sequence[int] = ()) -> Peer:
        peer = Peer(self._site, rank, side, terms, device, rooms)
        self._peers.append(peer)
        return peer

    def _neighbour(self, peer: Peer) -> Neighbour:
        return peer if self._site.replacement_s is not None else Irreplaceable()


def announce_durable(board: Board, rank: int, index: int) -> None:
    """Tell the sender to `rank` that a replacement there would ask for micro-batch `index` or a later one."""
    board.post(f"durable/{rank}", {"index": index})


def durable_index(board: Board, rank: int) -> int | None:
    """What `announce_durable` said last."""
    note = board.find(f"durable/{rank}")
    return int(note["index"]) if note is not None else None


def address_towards(host: str, port: int) -> str:
    """This machine's address as seen from `host`: the one its route to `host` uses. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
