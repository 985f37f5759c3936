"""A crew: worker processes on this machine that live through a whole measurement and do what its leader asks.

    leader ── hosts the store, starts ──▶ python -m MODULE rank port      rank 0 .. size - 1
       │        notes on the board            │
       └──────── gather("done/7") ◀───────────┘ post("done/7/rank")

No worker is replaced: the first failure of any ends them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, final

import torch

from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.channels.heartbeat import FAILURE, remote_error
from pipetrgl.errors import LaunchError, LinkError
from pipetrgl.launchers.accounts import failure_note, report
from pipetrgl.launchers.local import wait_for, worker_environ
from pipetrgl.launchers.membership import Membership
from pipetrgl.launchers.process import exit_now
from pipetrgl.launchers.supervise import host_store
from pipetrgl.logs import log_to_stderr
from pipetrgl.world import Place

HOST = "127.0.0.1"
_POLL_S = 0.05  # seldom: the leader shares its processor with a worker
_STORE_S = 30.0
_KILL_S = 5.0
_LAST_WORDS_BYTES = 2000

Work = Callable[[Membership, Board, Mapping[str, str]], None]


@final
class Crew:
    """Starts the workers on entry, and ends them on exit, whatever they are doing.

    Args:
        module: run as a program by every worker, which calls `serve`.
        size: number of workers.
        num_threads: intra-op threads of each.
    """

    def __init__(self, module: str, size: int, num_threads: int) -> None:
        self.board = Board(host_store(HOST, 0), _STORE_S)
        self._command = [sys.executable, "-m", module]
        self._environ = worker_environ(os.environ, num_threads)
        self._places = [Place(rank, rank, 0) for rank in range(size)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs = tempfile.TemporaryDirectory(prefix="pipetrgl-crew-")

    def __enter__(self) -> Self:
        try:
            for place in self._places:
                self._start(place.rank)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def gather(self, name: str, timeout_s: float) -> list[Any]:
        """Every worker's note `name/rank`, once all are there.

        Raises:
            PipetrglError: the first failure of any worker.
            LinkError: a note did not come in time; says whose.
        """
        notes: list[Any] = []
        deadline = time.monotonic() + timeout_s
        while len(notes) < len(self._places):
            self._look_after_all()
            if (note := self.board.find(f"{name}/{len(notes)}")) is not None:
                notes.append(note)
            elif time.monotonic() > deadline:
                raise LinkError(f"waited {timeout_s:.0f} s for worker {len(notes)} to say that it is {name}")
            else:
                time.sleep(_POLL_S)
        return notes

    def _start(self, rank: int) -> None:
        with self._log(rank).open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [*self._command, str(rank), str(self.board.store.port)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environ,
                    start_new_session=True,  # so that Ctrl-C reaches this process alone, which then ends them
                )
            )

    def _look_after_all(self) -> None:
        if (note := self.board.find(FAILURE)) is not None:
            raise _failure(note)
        for place, process in zip(self._places, self._processes, strict=True):
            if (code := process.poll()) is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                error = LaunchError(f"worker {place.rank}, process {process.pid}, {how}{self._last_words(place.rank)}")
                # it may have said why between the two looks, and others must not take its loss for a failure of theirs
                self.board.post_first(FAILURE, failure_note(error, place))
                raise _failure(self.board.find(FAILURE) or {})

    def _last_words(self, rank: int) -> str:
        words = self._log(rank).read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace").strip()
        return f"; its last words: {words}" if words else ""

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"worker-{rank}.log"

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        wait_for(self._processes, _KILL_S)
        self._logs.cleanup()


def _failure(note: Mapping[str, Any]) -> BaseException:
    """A worker's failure, with its traceback."""
    error = remote_error(note)
    if note["traceback"]:
        error.add_note(str(note["traceback"]))
    return error


def serve(work: Work) -> NoReturn:
    """The whole life of a crew's worker, called by the module's main: `work`, and word to the leader if it fails."""
    log_to_stderr()
    rank = int(sys.argv[1])
    store = TCPStore(HOST, int(sys.argv[2]), is_master=False, timeout=timedelta(seconds=_STORE_S))
    member = Membership(store, Place(rank, rank, 0), torch.device("cpu"), HOST)
    board = Board(store, _STORE_S)
    try:
        work(member, board, dict(os.environ))
    except StoreLostError:
        exit_now(LaunchError.exit_code)  # the leader has gone: nobody is left to tell
    except BaseException as error:
        report(error, board, member)
        exit_now(LaunchError.exit_code)
    exit_now(0)
