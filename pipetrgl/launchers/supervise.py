"""The supervisor: starts a run's workers, watches them, and replaces one that dies while the others only wait.

    worker 1 dies ─▶ a new worker 1 starts from its own newest durable checkpoint
                     worker 0 sends it again what it had sent since then (its replay log)
                     worker 2 tells it what it has already

Where that is not possible, the error ends all workers, and `launchers/start.py` may start the whole run again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, final

from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import Store, TCPStore
from pipetrgl.channels.connect import announce_durable
from pipetrgl.channels.heartbeat import FAILURE, Watch, remote_error
from pipetrgl.channels.peer import announce_recovery, announce_replacement
from pipetrgl.config.load import dump
from pipetrgl.engine.checkpoint import Checkpoint, newest_complete, step_folder
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.errors import ConfigError, LaunchError, LinkError, ReplayGapError, StalledError
from pipetrgl.launchers.accounts import account_of, failure_note
from pipetrgl.launchers.membership import name_of
from pipetrgl.launchers.rows import Collector
from pipetrgl.launchers.signals import release, share_stop
from pipetrgl.launchers.store_links import replaces_stages
from pipetrgl.worker import Job
from pipetrgl.world import Place

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_POLL_WORKER_S = 0.005  # each look asks the store for every worker's next row
_GRACE_S = 5.0


class Workers(Protocol):
    """A run's worker processes, by rank, as a launcher starts and ends them."""

    def start(self, rank: int, incarnation: int) -> None:
        """Start one, which then calls `process.serve`."""

    def ending(self, rank: int) -> str | None:
        """How the newest worker at `rank` ended: None while it runs, "" if well, else "process 17 was killed by .."."""

    def kill(self, rank: int) -> None:
        """End it at once, also where it does not react; `ending` says so afterwards."""

    def end(self) -> None:
        """End whatever is still there; leave nothing behind."""


@final
class Budget:
    """How many failures a run may still survive, of single stages and of the whole run together."""

    def __init__(self, max_failures: int) -> None:
        self._left = max_failures

    def spend(self) -> bool:
        """Use one; False if none is left."""
        self._left -= 1
        return self._left >= 0


@final
@dataclass
class _Seat:
    """What the supervisor knows of the worker at one rank.

    Attributes:
        linked: all its links are open.
        files: step -> the row of its checkpoint file.
        durable: what a replacement would start from.
        newest_step: that it has reported.
        lost: when and at which step its predecessor died, until the replacement has caught up.
    """

    place: Place
    incarnation: int = 0
    linked: bool = False
    files: dict[int, Row] = field(default_factory=dict)
    durable: Checkpoint | None = None
    newest_step: int = 0
    lost: _Loss | None = None


@final
@dataclass(frozen=True)
class _Loss:
    """A failure that one stage's replacement is getting over."""

    time: float
    step: int
    from_step: int
    error: str


@final
class Supervisor:
    """Runs a job's workers to the end.

    Args:
        job: the run.
        board: over the store that this process hosts.
        workers: starts and ends processes.
        sink: takes all workers' rows.
        budget: of failures.
    """

    def __init__(self, job: Job, board: Board, workers: Workers, sink: Sink, budget: Budget) -> None:
        self._job = job
        self._board = board
        self._workers = workers
        self._sink = sink
        self._budget = budget
        world, channel = job.blueprint.world, job.blueprint.config.channel
        self._seats = [_Seat(place, durable=job.checkpoint) for place in world.places]
        self._collector = Collector(board, world.size)
        names = {seat.place.rank: name_of(seat.place) for seat in self._seats}
        self._watch = Watch(names, channel.heartbeat_timeout_s)
        self._next_look = 0.0
        self._released = False
        self._account: dict[str, Any] | None = None

    def run(self) -> None:
        """Return when every worker has ended well.

        Raises:
            PipetrglError: the run's first error that no replacement could mend; no process is left behind.
        """
        blueprint = self._job.blueprint
        self._board.post("blueprint", {"config": dump(blueprint.config), "facts": blueprint.facts()})
        try:
            for seat in self._seats:
                self._start(seat)
            while not all(self._has_left(seat) for seat in self._seats):
                self._look_after_all()
                time.sleep(max(_POLL_S, _POLL_WORKER_S * len(self._seats)))
            self._hand_on(self._collector.poll())
        except BaseException as error:
            note = self._account or failure_note(error, Place(-1, -1, 0))
            self._board.post_first(FAILURE, note)
            self._await_end()
            keep_traceback(self._job.run, note)
            raise remote_error(note) from error
        finally:
            self._workers.end()

    def _look_after_all(self) -> None:
        self._hand_on(self._collector.poll())
        share_stop(self._job.stop, self._board)
        if self._collector.complete and not self._released:
            release(self._board)
            self._released = True
        for seat in self._seats:
            how = self._workers.ending(seat.place.rank)
            if how and not self._released:
                self._lost(seat, LaunchError(f"{name_of(seat.place)}, {how}"))
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self._job.blueprint.config.channel.heartbeat_s
            for rank, error in self._watch.silent(self._board).items():
                self._workers.kill(rank)
                if not self._released:
                    self._lost(self._seats[rank], error)

    def _has_left(self, seat: _Seat) -> bool:
        """Whether it has ended well; once released it has done everything, however it ends."""
        how = self._workers.ending(seat.place.rank)
        return how is not None if self._released else how == ""

    def _start(self, seat: _Seat) -> None:
        checkpoint = seat.durable.to_dict() if seat.durable else {}
        self._board.post(f"start/{seat.place.rank}/{seat.incarnation}", checkpoint)
        self._workers.start(seat.place.rank, seat.incarnation)

    def _lost(self, seat: _Seat, error: LaunchError | LinkError) -> None:
        """Replace the worker, or raise why it ended."""
        account = account_of(self._board, seat.place.rank, seat.incarnation)
        why = remote_error(account) if account is not None else error
        # a worker that gave up waiting is not the one at fault
        mendable = isinstance(why, LaunchError | LinkError) and not isinstance(why, ReplayGapError | StalledError)
        if mendable and self._can_replace(seat) and self._budget.spend():
            self._replace(seat, str(why), account)
            return
        self._account = account
        raise why

    def _can_replace(self, seat: _Seat) -> bool:
        """Both neighbours must be there, with their links: they hold what the replacement needs."""
        if self._released or not replaces_stages(self._job.blueprint.config):
            return False
        if self._job.stop.is_set():  # a new stage 0 would end its stream before what stage 1 has already
            return False
        stages = (seat.place.stage - 1, seat.place.stage + 1)
        neighbours = [other for other in self._seats if other.place.stage in stages]
        return all(other.linked and self._workers.ending(other.place.rank) is None for other in neighbours)

    def _replace(self, seat: _Seat, why: str, account: dict[str, Any] | None) -> None:
        rank, stage = seat.place.rank, seat.place.stage
        self._hand_on(self._collector.expect_anew(rank))
        self._watch.expect_anew(self._board, rank)
        if account is not None:
            keep_traceback(self._job.run, account)
        seat.incarnation += 1
        seat.linked = False
        seat.durable = self._start_of(seat)
        from_step = seat.durable.step if seat.durable else 0
        seat.lost = _Loss(time.monotonic(), seat.newest_step, from_step, why)
        announce_recovery(self._board, under_way=True)
        announce_replacement(self._board, rank, seat.incarnation)
        self._start(seat)
        message = f"{why}; starting stage {stage} again alone, from step {from_step}"
        self._sink({"kind": "log", "stage": stage, "level": "WARNING", "message": message})

    def _start_of(self, seat: _Seat) -> Checkpoint | None:
        """Its newest checkpoint that the next stage has wholly received and the stage before has not forgotten."""
        if seat.durable is None:
            return None
        try:
            return seat.durable.verified()
        except ConfigError as error:
            logger.warning("%s", error)
            return newest_complete(self._job.run)

    def _hand_on(self, rows: Iterable[tuple[int, Row]]) -> None:
        for rank, row in rows:
            self._note(self._seats[rank], row)
            self._sink(row)

    def _note(self, seat: _Seat, row: Row) -> None:
        kind = row["kind"]
        if kind == "linked":
            seat.linked = True
            if seat.lost is not None:
                self._report_recovery(seat, seat.lost, "linked")
                announce_recovery(self._board, under_way=not all(other.linked for other in self._seats))
        elif kind == "checkpoint":
            seat.files[row["step"]] = row
        elif kind == "durable":
            self._note_durable(seat, row["step"], row["next_index"])
        elif kind == "train":
            seat.newest_step = max(seat.newest_step, row["step"])
            if seat.lost is not None and row["step"] > seat.lost.step:
                self._report_recovery(seat, seat.lost, "caught up")
                seat.lost = None

    def _note_durable(self, seat: _Seat, step: int, next_index: int) -> None:
        file, folder = seat.files[step], step_folder(self._job.run, step)
        seat.durable = Checkpoint(folder, step, {file["file"]: file["sha256"]}, self._job.blueprint.updates(step))
        seat.files = {later: row for later, row in seat.files.items() if later > step}
        announce_durable(self._board, seat.place.rank, next_index)

    def _report_recovery(self, seat: _Seat, loss: _Loss, what: str) -> None:
        row = {
            "kind": "recovery",
            "stage": seat.place.stage,
            "what": what,
            "step": loss.step,
            "from_step": loss.from_step,
            "seconds": time.monotonic() - loss.time,
            "error": loss.error,
        }
        self._sink(row)

    def _await_end(self) -> None:
        """Give the workers time to notice the failure and to post their last rows."""
        deadline = time.monotonic() + _GRACE_S
        ranks = [seat.place.rank for seat in self._seats]
        while time.monotonic() < deadline and any(self._workers.ending(rank) is None for rank in ranks):
            self._hand_on(self._collector.poll())
            time.sleep(_POLL_S)
        self._hand_on(self._collector.poll())


def host_store(address: str, port: int) -> Store:
    """The run's store, hosted by this process for as long as the object lives.

    Raises:
        LaunchError: the port is taken.
    """
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    except RuntimeError as error:
        reason = "it is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise LaunchError(
            f"launcher.port: cannot listen on port {port}: {reason}; choose another, or 0 for a free one"
        ) from error


def keep_traceback(run: Path, note: dict[str, Any]) -> None:
    """Write a failure's traceback to errors/ in the run folder."""
    if note["traceback"]:
        folder = run / "errors"
        folder.mkdir(exist_ok=True)
        name = f"stage-{note['stage']}.txt" if note["stage"] >= 0 else "launcher.txt"
        (folder / name).write_text(f"{note['message']}\n\n{note['traceback']}", encoding="utf-8")
