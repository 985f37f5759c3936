"""One worker process of a run, whoever started it: joins through the store, trains its stage, reports how it ended."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.c10d import Store
from pipetrgl.channels.codecs import CODECS
from pipetrgl.channels.connect import Connector
from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.channels.heartbeat import FAILURE, Heartbeat, RemoteError, remote_error
from pipetrgl.channels.link import LinkTerms, LostPeerError
from pipetrgl.channels.peer import Hello, Site
from pipetrgl.channels.wire import TensorSpec, label_words
from pipetrgl.config.load import undump
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.engine.pulse import Pulse
from pipetrgl.errors import Interrupted, LaunchError, PipetrglError
from pipetrgl.logs import log_to_stderr
from pipetrgl.seeds import derive
from pipetrgl.worker import Job, run_worker
from pipetrgl.world import Place

logger = logging.getLogger(__name__)

_STOP, _RELEASE = "stop", "release"
_POLL_S = 0.05
_LEAST_REPLACEMENT_S = 10.0
_GRACE_S = 3.0  # how long a worker that lost its neighbour waits for the neighbour's own account


@dataclass(frozen=True)
class Membership:
    """How a process belongs to a run.

    Attributes:
        store: of the run, with its prefix; cloned for the heartbeat.
        place: rank, stage and replica.
        device: of the stage.
        address: of this machine, as the other workers reach it.
        supervised: a launcher looks after all workers: it decides what a failure means and when everybody may leave.
        incarnation: 0 for the first worker at this place, one more for each that replaces it.
    """

    store: Store
    place: Place
    device: torch.device
    address: str
    supervised: bool = False
    incarnation: int = 0


def run_process(job: Job, member: Membership) -> None:
    """Train one stage; on failure tell the others and raise.

    Raises:
        PipetrglError: the run's first error, this worker's or another's.
    """
    board, alarm, pulse = Board(member.store, job.blueprint.config.channel.heartbeat_timeout_s), Alarm(), Pulse()
    heartbeat = _heartbeat(job, member, alarm)
    heartbeat.looks.append(functools.partial(_end_if_stuck, pulse, job, member))
    heartbeat.start()
    sink = BoardSink(board, member.place.rank, member.incarnation)
    forward = _ForwardLogs(sink, member.place.stage)
    logging.getLogger("pipetrgl").addHandler(forward)
    try:
        sink({"kind": "worker", "stage": member.place.stage, "host": socket.gethostname(), "pid": os.getpid()})
        where = name_of(member.place), os.getpid(), socket.gethostname(), job.first_step
        logger.info("%s is process %d on %s, from step %d", *where)
        links = StoreLinks(job, member, board, alarm)
        heartbeat.looks.append(links.look)
        run_worker(job, member.place, links, sink, member.device, alarm, pulse)
        sink({"kind": "end", "stage": member.place.stage})
        if member.supervised:
            _await_release(board, alarm)
        links.close()
        heartbeat.stop()
    except BaseException as error:
        failure = _report(error, board, member)
        if failure is error:
            raise
        raise failure from error
    finally:
        logging.getLogger("pipetrgl").removeHandler(forward)


def serve(run: Path, rank: int, incarnation: int, store: Store, address: str, local_rank: int) -> int:
    """The whole life of a supervised worker process; returns its exit code.

    Args:
        run: the run folder.
        rank, incarnation: of this worker.
        store: the run's.
        address: of this machine, as the other workers reach it.
        local_rank: of this worker among those of its machine; names its GPU.
    """
    stop = threading.Event()
    stop_on_signals(stop)
    log_to_stderr()
    board = Board(store, 30.0)
    try:
        note = board.read("blueprint", 30.0, Alarm(), "the launcher's blueprint")
        start = board.read(f"start/{rank}/{incarnation}", 30.0, Alarm(), "the launcher's word where to start")
        blueprint = draw_up(undump(note["config"]), DataSpec.from_dict(note["spec"]))
        job = Job(blueprint, run, dict(os.environ), Checkpoint.from_dict(start), stop)
        run.mkdir(parents=True, exist_ok=True)  # on another machine
        device = device_of(blueprint, local_rank)
        run_process(job, Membership(store, blueprint.world.place(rank), device, address, True, incarnation))
    except Interrupted:
        return Interrupted.exit_code
    except PipetrglError as error:
        logger.error("error: %s", error)
        return error.exit_code
    return 0


def device_of(blueprint: Blueprint, local_rank: int) -> torch.device:
    """The CPU, or this worker's GPU of its node."""
    if blueprint.config.pipeline.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def stop_on_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGUSR1 (Slurm's warning) ask for an end at the next step, with a checkpoint; a second one ends
    the run at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise Interrupted(f"ended by {signal.Signals(number).name}")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)


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

    def __init__(self, board: Board, rank: int, incarnation: int) -> None:
        self._board = board
        self._prefix = _rows(rank, incarnation)
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, row: Row) -> None:
        with self._lock:
            self._board.post(f"{self._prefix}/{self._count}", row)
            self._count += 1


@final
class Collector:
    """Reads the rows that the workers posted, in each worker's order."""

    def __init__(self, board: Board, world_size: int) -> None:
        self._board = board
        self._counts = [0] * world_size
        self._incarnations = [0] * world_size
        self._ended: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every worker has posted its last row."""
        return len(self._ended) == len(self._counts)

    def poll(self) -> Iterator[tuple[int, Row]]:
        """Every new row with the rank that posted it."""
        for rank in range(len(self._counts)):
            yield from self._rows_of(rank)

    def expect_anew(self, rank: int) -> Iterator[tuple[int, Row]]:
        """The last rows of a worker that has died; from now on, those of its replacement are read."""
        yield from self._rows_of(rank)
        self._ended.discard(rank)
        self._counts[rank] = 0
        self._incarnations[rank] += 1

    def _rows_of(self, rank: int) -> Iterator[tuple[int, Row]]:
        prefix = _rows(rank, self._incarnations[rank])
        while (row := self._board.take(f"{prefix}/{self._counts[rank]}")) is not None:
            self._counts[rank] += 1
            if row["kind"] == "end":
                self._ended.add(rank)
            else:
                yield rank, row


def _rows(rank: int, incarnation: int) -> str:
    return f"rows/{rank}/{incarnation}"


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
            incarnation=member.incarnation,
        )
        hello.post(board)
        self._first_index = blueprint.itinerary.first_index(job.first_step)
        channel = blueprint.config.channel
        site = Site(board, hello, member.address, channel.start_timeout_s, alarm, _replacement_s(job, member))
        self._connector = Connector(site, channel.log_bytes)

    @property
    def clock_offset_s(self) -> float:
        return self._connector.clock_offset_s

    def look(self, board: Board) -> None:
        """Notice replaced neighbours, through the heartbeat's client of the store."""
        self._connector.look(board)

    def close(self) -> None:
        """End the links' threads; nobody will be replaced any more."""
        self._connector.close()

    def inbox(self, stage: int) -> Inbox:
        expected = [TensorSpec(self._blueprint.input_shape(stage), torch.float32)]
        peer = self._blueprint.world.rank(stage - 1)
        return self._connector.inbox(peer, self._terms(stage - 1), expected, self._member.device, self._first_index)

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


def _heartbeat(job: Job, member: Membership, alarm: Alarm) -> Heartbeat:
    """Beats for this worker, and passes on the wish to stop; unsupervised, it watches the neighbours as well."""
    stage, world, channel = member.place.stage, job.blueprint.world, job.blueprint.config.channel
    neighbours = [] if member.supervised else [k for k in (stage - 1, stage + 1) if 0 <= k < world.num_stages]
    watched = {world.rank(k): name_of(world.place(world.rank(k))) for k in neighbours}
    store, rank = member.store.clone(), member.place.rank
    heartbeat = Heartbeat(store, rank, watched, channel.heartbeat_s, channel.heartbeat_timeout_s, alarm)
    heartbeat.looks.append(functools.partial(share_stop, job.stop))
    return heartbeat


def share_stop(stop: threading.Event, board: Board) -> None:
    """Hand on a signal that this process got, or learn of one that another process of the run got."""
    if stop.is_set():
        board.post(_STOP, {})
    elif board.find(_STOP) is not None:
        stop.set()


def _end_if_stuck(pulse: Pulse, job: Job, member: Membership, board: Board) -> None:
    """End this process, with its own account, where the stage's thread hangs in a computation and never will.

    Well before the neighbours' deadline, who would name each other.
    """
    limit_s = job.blueprint.config.channel.wait_timeout_s / 2
    if (what := pulse.stuck(limit_s)) is not None:
        who = name_of(member.place)
        _report(LaunchError(f"{who}, {what} has taken more than {limit_s:.0f} s; it hangs"), board, member)
        exit_now(LaunchError.exit_code)


def release(board: Board) -> None:
    """Let all supervised workers leave."""
    board.post(_RELEASE, {})


def _await_release(board: Board, alarm: Alarm) -> None:
    """Stay, with all links, until every worker is done: a neighbour may still have to be replaced."""
    while board.find(_RELEASE) is None:
        alarm.check()
        time.sleep(_POLL_S)


def _replacement_s(job: Job, member: Membership) -> float | None:
    """How long to wait for word of a replacement when a neighbour is lost; None where stages are not replaced."""
    config = job.blueprint.config
    if not (member.supervised and replaces_stages(config)):
        return None
    return max(_LEAST_REPLACEMENT_S, 2 * config.channel.heartbeat_timeout_s)


def replaces_stages(config: Config) -> bool:
    """Whether a worker that dies is replaced alone. Never on a GPU: NCCL has no way to give up one broken pair."""
    launcher = config.launcher
    return launcher.restart == "stage" and launcher.max_failures > 0 and config.pipeline.device == "cpu"


def account_of(board: Board, rank: int, incarnation: int) -> dict[str, Any] | None:
    """Why a supervised worker ended, in its own words."""
    note: dict[str, Any] | None = board.find(_account(rank, incarnation))
    return note


def _account(rank: int, incarnation: int) -> str:
    return f"account/{rank}/{incarnation}"


def _report(error: BaseException, board: Board, member: Membership) -> BaseException:
    """Post this worker's error, unless it is only the echo of another's; returns the run's first one if there is one.

    Unsupervised, it is the run's first failure and ends everybody; else the supervisor decides.
    """
    if isinstance(error.__cause__, RemoteError) or isinstance(error, StoreLostError):
        return error  # posting the loss of the store would wait for it once more
    place = member.place
    try:
        if isinstance(error, LostPeerError) and (failure := _wait_for_account(board)) is not None:
            return remote_error(failure)
        note = failure_note(error, place)
        if member.supervised:
            board.post(_account(place.rank, member.incarnation), note)
            return remote_error(note)
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
