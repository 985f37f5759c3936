"""The torchrun launcher: this process is one rank of a world that torchrun started, on this machine or on many."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast, final

from pipetrgl.blueprint import Blueprint, draw_up, draw_up_again
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import PrefixStore, Store, rendezvous
from pipetrgl.channels.connect import address_towards
from pipetrgl.channels.heartbeat import FAILURE, Watch, remote_error
from pipetrgl.config.load import config_hash, dump, undump
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint
from pipetrgl.engine.metrics import Sink
from pipetrgl.errors import LaunchError, LinkError
from pipetrgl.launchers.membership import Membership, name_of
from pipetrgl.launchers.process import device_of, run_process
from pipetrgl.launchers.rows import Collector
from pipetrgl.logs import log_to_stderr
from pipetrgl.worker import Job

Start = tuple[Path, Checkpoint | None]

_POLL_S = 0.2
_LOOK_S = 0.02


@final
@dataclass(frozen=True)
class Rank:
    """This process's place in torchrun's world.

    Attributes:
        store: of torchrun's agent, with a prefix of this attempt's own: a restart starts from a clean slate.
        attempt: 1, and one more each time torchrun starts this world again (--max-restarts).
    """

    store: Store
    rank: int
    world_size: int
    attempt: int

    @property
    def leads(self) -> bool:
        """Rank 0 keeps the run folder's books and talks to the user."""
        return self.rank == 0

    def agree_on(self, name: str, make: Callable[[], dict[str, object]], timeout_s: float) -> dict[str, object]:
        """A note that rank 0 makes and every rank gets."""
        board = Board(self.store, timeout_s)
        if self.leads:
            board.post(name, make())
        note: dict[str, object] = board.read(name, timeout_s, Alarm(), "rank 0 to start; see its error")
        return note


def is_torchrun() -> bool:
    """Whether torchrun, or a scheduler that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join(timeout_s: float) -> Rank:
    """Reach the store of torchrun's agent, and wait for all ranks to do the same.

    Raises:
        LaunchError: not started by torchrun, or its store cannot be reached.
        LinkError: not all ranks came within `timeout_s`.
    """
    if not is_torchrun():
        raise LaunchError("launcher.name: 'torchrun' runs under torchrun: torchrun --nproc-per-node K -m pipetrgl ...")
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(f"cannot reach torchrun's store at {where}: {str(error).splitlines()[0]}") from error
    board = Board(PrefixStore("pipetrgl", store), timeout_s)
    attempt = _gather(board, world_size, timeout_s) if rank == 0 else _register(board, rank, timeout_s)
    return Rank(PrefixStore(f"pipetrgl/attempt-{attempt}", store), rank, world_size, attempt)


def _gather(board: Board, world_size: int, timeout_s: float) -> int:
    """Rank 0 numbers the attempt and tells everybody who asks until every rank has heard.

    The store outlives an attempt, and torchrun's own count will not do: on a node whose workers are started again only
    because those of another node failed, it stays behind. What a rank of an earlier attempt asked may still stand
    there; an answer to it harms nobody, for each asks under a ticket of its own.
    """
    attempt = int(board.find("attempt") or 0) + 1
    board.post("attempt", attempt)
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout_s
    while missing:
        for rank in tuple(missing):
            if board.find(f"heard/{attempt}/{rank}") is not None:
                missing.discard(rank)
            elif (ticket := board.find(f"ask/{rank}")) is not None:
                board.post(f"answer/{ticket}", attempt)
        if time.monotonic() > deadline:
            raise LinkError(f"waited {timeout_s:.0f} s for ranks {sorted(missing)} to start")
        time.sleep(_LOOK_S)
    return attempt


def _register(board: Board, rank: int, timeout_s: float) -> int:
    ticket = uuid.uuid4().hex
    board.post(f"ask/{rank}", ticket)
    attempt = int(board.read(f"answer/{ticket}", timeout_s, Alarm(), "rank 0 to start; see its error"))
    board.post(f"heard/{attempt}/{rank}", True)
    return attempt


def launch(job: Job, me: Rank, sink: Sink) -> None:
    """Train this rank's stage; on rank 0 also collect everybody's rows into `sink`.

    Raises:
        PipetrglError: the first error of any rank.
    """
    blueprint = job.blueprint
    blueprint.world.require_size(me.world_size)
    place = blueprint.world.place(me.rank)
    log_to_stderr()
    device = device_of(blueprint, int(os.environ.get("LOCAL_RANK", "0")))
    member = Membership(me.store, place, device, own_address(me.world_size))
    if not me.leads:
        run_process(job, member)
        return
    silence_s = blueprint.config.channel.heartbeat_timeout_s
    collector = Collector(Board(me.store.clone(), silence_s), me.world_size)
    stop = threading.Event()
    thread = threading.Thread(target=_collect, args=(collector, sink, stop), name="collector", daemon=True)
    thread.start()
    try:
        run_process(job, member)
        _wait_for_the_others(blueprint, collector, thread, me)
    finally:
        stop.set()
        thread.join(5.0)


def own_address(world_size: int) -> str:
    """This machine's address as the other ranks reach it.

    Raises:
        LaunchError: it is a loopback address, though some ranks are elsewhere.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = address_towards(host, port)
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if ipaddress.ip_address(address).is_loopback and num_here < world_size:
        raise LaunchError(
            f"this machine, {socket.gethostname()}, takes MASTER_ADDR '{host}' for its own loopback address, where the "
            "other machines cannot reach it; give torchrun plain addresses, see docs/clusters.md: --local-addr ADDRESS "
            "beside --rdzv-endpoint, or --master-addr ADDRESS"
        )
    return address


def _collect(collector: Collector, sink: Sink, stop: threading.Event) -> None:
    def hand_on() -> None:
        for _, row in collector.poll():
            sink(row)

    while not collector.complete and not stop.wait(_POLL_S):
        hand_on()
    hand_on()


def _wait_for_the_others(blueprint: Blueprint, collector: Collector, thread: threading.Thread, me: Rank) -> None:
    """Stage 0 is always done first; the run is done when every rank has posted its last row.

    The others end within the time that the last micro-batches take to pass. Rank 0 watches them all: it may be the only
    one left on its machine, and then no neighbour would miss those on a machine that is lost now.
    """
    channel = blueprint.config.channel
    board = Board(me.store, channel.heartbeat_timeout_s)
    names = {rank: name_of(blueprint.world.place(rank)) for rank in range(1, me.world_size)}
    watch = Watch(names, channel.heartbeat_timeout_s)
    deadline = time.monotonic() + channel.wait_timeout_s
    while thread.is_alive():
        thread.join(_POLL_S)
        if (failure := board.find(FAILURE)) is not None:
            raise remote_error(failure)
        for error in watch.silent(board).values():
            raise error
        if time.monotonic() > deadline:
            raise LinkError(f"waited {channel.wait_timeout_s:.0f} s for the last rows of the other ranks")
    if not collector.complete:
        raise LaunchError("the rows of the other ranks could not be collected; see the traceback above")


def shared_blueprint(me: Rank, config: Config, make: Callable[[], Blueprint], timeout_s: float) -> Blueprint:
    """The blueprint as rank 0 makes it, which reads the data: no other rank needs any."""
    own, made = config_hash(config), make() if me.leads else None
    note = me.agree_on("blueprint", lambda: {"config": own, "facts": made.facts() if made else {}}, timeout_s)
    if made is not None:
        return made
    facts = cast(dict[str, Any], note["facts"])
    if note["config"] != own:  # started with another config: the links will name both
        return draw_up(config, DataSpec.from_dict(facts["spec"]))
    return draw_up_again(config, facts)


def shared_config(me: Rank, make: Callable[[], Config], timeout_s: float) -> Config:
    """The config as rank 0 completes it."""
    return undump(str(me.agree_on("config", lambda: {"yaml": dump(make())}, timeout_s)["yaml"]))


def shared_start(me: Rank, make: Callable[[], Start], timeout_s: float) -> Start:
    """The run folder and checkpoint that rank 0 chose; on another machine the same folder is created."""

    def chosen() -> dict[str, object]:
        run, checkpoint = make()
        return {"run": str(run), "checkpoint": checkpoint.to_dict() if checkpoint else {}}

    note = me.agree_on("start", chosen, timeout_s)
    run = Path(str(note["run"]))
    run.mkdir(parents=True, exist_ok=True)
    return run, Checkpoint.from_dict(cast(dict[str, Any], note["checkpoint"]))
