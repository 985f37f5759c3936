"""One worker process of a run, whoever started it: joins through the store, trains its stage, reports how it ended."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from pipetrgl.blueprint import Blueprint, draw_up_again
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import Store
from pipetrgl.channels.heartbeat import Heartbeat
from pipetrgl.config.load import undump
from pipetrgl.engine.checkpoint import Checkpoint
from pipetrgl.engine.metrics import Sink
from pipetrgl.engine.pulse import Pulse
from pipetrgl.errors import Interrupted, LaunchError, PipetrglError
from pipetrgl.launchers.accounts import report
from pipetrgl.launchers.membership import Membership, name_of
from pipetrgl.launchers.rows import BoardSink, ForwardLogs
from pipetrgl.launchers.signals import await_release, share_stop, stop_on_signals
from pipetrgl.launchers.store_links import StoreLinks, replaces_stages
from pipetrgl.logs import log_to_stderr
from pipetrgl.worker import Job, run_worker
from pipetrgl.world import Place

logger = logging.getLogger(__name__)

Work = Callable[[Job, Place, StoreLinks, Sink, torch.device, Alarm, Pulse], None]
"""Trains one stage from the first micro-batch to the last."""


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
    forward = ForwardLogs(sink, member.place.stage)
    logging.getLogger("pipetrgl").addHandler(forward)
    try:
        who = {"stage": member.place.stage, "replica": member.place.replica}
        sink({"kind": "worker", **who, "host": socket.gethostname(), "pid": os.getpid()})
        where = name_of(member.place), os.getpid(), socket.gethostname(), job.first_step
        logger.info("%s is process %d on %s, from step %d", *where)
        links = StoreLinks(job, member, board, alarm)
        heartbeat.looks.append(links.look)
        _work_of(job.blueprint)(job, member.place, links, sink, member.device, alarm, pulse)
        sink({"kind": "end", "stage": member.place.stage})
        if member.supervised:
            await_release(board, alarm)
        links.close()
        heartbeat.stop()
    except BaseException as error:
        failure = report(error, board, member)
        if failure is error:
            raise
        raise failure from error
    finally:
        logging.getLogger("pipetrgl").removeHandler(forward)


def _work_of(blueprint: Blueprint) -> Work:
    if not blueprint.end_to_end or blueprint.num_stages == 1:
        return run_worker
    # torch's schedules bring its compiler along, whose import takes longer than torch's own
    from pipetrgl.scheduled import run_scheduled

    return run_scheduled


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
        blueprint = draw_up_again(undump(note["config"]), note["facts"])
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
    if blueprint.config.pipeline.hardware == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def exit_now(code: int) -> NoReturn:
    """Leave without waiting for threads that hang in a broken link."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


def _heartbeat(job: Job, member: Membership, alarm: Alarm) -> Heartbeat:
    """Beats for this worker, and passes on the wish to stop; unsupervised, it watches the neighbours as well."""
    place, world, channel = member.place, job.blueprint.world, job.blueprint.config.channel
    neighbours = {*world.senders(place), *world.receivers(place), *world.group(place)} - {place}
    watched = {} if member.supervised else {other.rank: name_of(other) for other in neighbours}
    store, rank = member.store.clone(), member.place.rank
    # a neighbour that is being replaced is news that everybody waits for; a failure shows as a broken link beforehand
    look_s = 0.25 if replaces_stages(job.blueprint.config) else 1.0
    heartbeat = Heartbeat(store, rank, watched, channel.heartbeat_s, look_s, channel.heartbeat_timeout_s, alarm)
    heartbeat.looks.append(functools.partial(share_stop, job.stop))
    return heartbeat


def _end_if_stuck(pulse: Pulse, job: Job, member: Membership, board: Board) -> None:
    """End this process, with its own account, where the stage's thread hangs in a computation and never will.

    Well before the neighbours' deadline, who would name each other.
    """
    limit_s = job.blueprint.config.channel.wait_timeout_s / 2
    if (what := pulse.stuck(limit_s)) is not None:
        who = name_of(member.place)
        report(LaunchError(f"{who}, {what} has taken more than {limit_s:.0f} s; it hangs"), board, member)
        exit_now(LaunchError.exit_code)
