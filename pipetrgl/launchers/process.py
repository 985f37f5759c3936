"""One worker process of a run, whoever started it: joins through the store, trains its stage, reports how it ended."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any, final

import torch

from pipetrgl.blueprint import Blueprint
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.c10d import Store
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.connect import Connector, Hello
from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.channels.heartbeat import FAILURE, Heartbeat, RemoteError, remote_error
from pipetrgl.channels.link import LinkTerms, LostPeerError
from pipetrgl.channels.wire import TensorSpec, label_words
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.errors import Interrupted, LaunchError, PipetrglError
from pipetrgl.seeds import derive
from pipetrgl.worker import Job, run_worker
from pipetrgl.world import Place

_GRACE_S = 3.0  # how long a worker that lost its neighbour waits for the neighbour's own account


@dataclass(frozen=True)
class Membership:
    """How a process belongs to a run.

    Attributes:
        store: of the run, with its prefix; cloned for the heartbeat.
        place: rank, stage and replica.
        device: of the stage.
        address: of this machine, as the other workers reach it.
    """

    store: Store
    place: Place
    device: torch.device
    address: str


def run_process(job: Job, member: Membership) -> None:
    """Train one stage; on failure tell the others and raise.

    Raises:
        PipetrglError: the run's first error, this worker's or another's.
    """
    board, alarm = Board(member.store, job.blueprint.config.channel.heartbeat_timeout_s), Alarm()
    heartbeat = _heartbeat(job.blueprint, member, alarm)
    heartbeat.start()
    sink = BoardSink(board, member.place.rank)
    forward = _ForwardLogs(sink, member.place.stage)
    logging.getLogger("pipetrgl").addHandler(forward)
    try:
        links = StoreLinks(job, member, board, alarm)
        run_worker(job, member.place, links, sink, member.device, alarm)
        sink({"kind": "end", "stage": member.place.stage})
        heartbeat.stop()
    except BaseException as error:
        failure = _report(error, board, member.place)
        if failure is error:
            raise
        raise failure from error
    finally:
        logging.getLogger("pipetrgl").removeHandler(forward)


def end_on_signals() -> None:
    """Turn SIGTERM into an error that ends the run in an orderly way."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"ended by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, interrupt)


def exit_now(code: int) -> None:
    """Leave without waiting for threads that hang in a broken link."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


def name_of(place: Place) -> str:
    if place.rank < 0:
        return "the launcher"
    return f"stage {place.stage} (rank {place.rank})"


@final
class BoardSink:
    """Posts rows for whoever leads the run; numbered, so that none is lost or read twice."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, row: Row) -> None:
        with self._lock:
            self._board.post(f"rows/{self._rank}/{self._count}", row)
            self._count += 1


@final
class Collector:
    """Reads the rows that the workers posted, in each worker's order."""

    def __init__(self, board: Board, world_size: int, sink: Sink) -> None:
        self._board = board
        self._counts = [0] * world_size
        self._ended: set[int] = set()
        self._sink = sink

    @property
    def complete(self) -> bool:
        """Whether every worker has posted its last row."""
        return len(self._ended) == len(self._counts)

    def poll(self) -> None:
        for rank in range(len(self._counts)):
            while (row := self._board.take(f"rows/{rank}/{self._counts[rank]}")) is not None:
                self._counts[rank] += 1
                if row["kind"] == "end":
                    self._ended.add(rank)
                else:
                    self._sink(row)


@final
class _ForwardLogs(logging.Handler):
    """Shows warnings of a worker to the user as well, who does not read the workers' log files."""

    def __init__(self, sink: Sink, stage: int) -> None:
        super().__init__(logging.WARNING)
        self._sink = sink
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        self._sink({"kind": "log", "stage": self._stage, "level": record.levelname, "message": record.getMessage()})


@final
class StoreLinks:
    """Links over torch.distributed, opened through the run's store."""

    def __init__(self, job: Job, member: Membership, board: Board, alarm: Alarm) -> None:
        blueprint = self._blueprint = job.blueprint
        self._run_id = derive(0, blueprint.config_hash, job.run.name)
        self._member = member
        hello = Hello(
            rank=member.place.rank,
            name=name_of(member.place),
            host=socket.gethostname(),
            device=member.device.type,
            config=blueprint.config_hash,
        )
        hello.post(board)
        timeout_s = blueprint.config.channel.start_timeout_s
        self._connector = Connector(board, hello, member.address, timeout_s, alarm)

    @property
    def clock_offset_s(self) -> float:
        return self._connector.clock_offset_s

    def inbox(self, stage: int) -> Inbox:
        expected = [TensorSpec(self._blueprint.input_shape(stage), torch.float32)]
        peer = self._blueprint.world.rank(stage - 1)
        return self._connector.inbox(peer, self._terms(stage - 1), expected, self._member.device)

    def outbox(self, stage: int) -> Outbox:
        peer = self._blueprint.world.rank(stage + 1)
        return self._connector.outbox(peer, self._terms(stage), self._member.device)

    def _terms(self, sender: int) -> LinkTerms:
        channel, world = self._blueprint.config.channel, self._blueprint.world
        return LinkTerms(
            run_id=self._run_id,
            capacity=channel.capacity,
            codec=CODECS[channel.codec],
            label_words=label_words(self._blueprint.max_rows),
            timeout_s=channel.wait_timeout_s,
            sender=name_of(world.place(world.rank(sender))),
            receiver=name_of(world.place(world.rank(sender + 1))),
        )


def _heartbeat(blueprint: Blueprint, member: Membership, alarm: Alarm) -> Heartbeat:
    stage, world = member.place.stage, blueprint.world
    neighbours = [k for k in (stage - 1, stage + 1) if 0 <= k < world.num_stages]
    watched = {world.rank(k): name_of(world.place(world.rank(k))) for k in neighbours}
    channel = blueprint.config.channel
    return Heartbeat(
        member.store.clone(), member.place.rank, watched, channel.heartbeat_s, channel.heartbeat_timeout_s, alarm
    )


def _report(error: BaseException, board: Board, place: Place) -> BaseException:
    """Post this worker's error as the run's first failure, unless it is only the echo of another's."""
    if isinstance(error.__cause__, RemoteError) or isinstance(error, StoreLostError):
        return error  # posting it would wait for the lost store once more
    try:
        if isinstance(error, LostPeerError) and (failure := _wait_for_account(board)) is not None:
            return remote_error(failure)
        note = failure_note(error, place)
        board.post_first(FAILURE, note)
        return remote_error(board.find(FAILURE) or note)  # another worker may have been first
    except StoreLostError as lost:
        return lost


def failure_note(error: BaseException, place: Place) -> dict[str, Any]:
    """An error as others will read it: kind, message, whose, traceback."""
    known = isinstance(error, PipetrglError)
    if isinstance(error, KeyboardInterrupt):
        error, known = Interrupted("interrupted"), True
    message = str(error) if known else f"{name_of(place)} failed: {type(error).__name__}: {error}"
    if isinstance(error, LostPeerError):
        message = f"{name_of(place)}: {message}"
    kind = next(kind.__name__ for kind in type(error).__mro__ if not known or kind.__module__.endswith(".errors"))
    return {
        "type": kind if known else LaunchError.__name__,
        "message": message,
        "where": name_of(place),
        "stage": place.stage,
        "traceback": "" if isinstance(error, Interrupted) else "".join(traceback.format_exception(error)),
    }


def _wait_for_account(board: Board) -> dict[str, Any] | None:
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        note: dict[str, Any] | None = board.find(FAILURE)
        if note is not None:
            return note
        time.sleep(0.05)
    return None
