"""Heartbeats: each worker counts up in the run's store, and its neighbours notice when it stops.

The first failure of a run spreads the same way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, final

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.c10d import Store
from pipetrgl.errors import BY_NAME, LaunchError, LinkError

FAILURE = "failure"
DONE = -1


@final
class Heartbeat:
    """A thread that beats for this worker, watches others, and rings the alarm for the first failure of any worker.

    Args:
        store: a client of its own, so that no other call can hold it up.
        rank: this worker's.
        watched: rank -> "stage 1 (rank 1)" of the workers to watch.
        interval_s: between two beats.
        look_s: at the most, between two looks at the run's failure and at whatever `looks` asks the store.
        timeout_s: silence after which a worker is taken for dead.
        alarm: rung.

    Attributes:
        looks: called with this thread's own client of the store, every `look_s`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        watched: Mapping[int, str],
        interval_s: float,
        look_s: float,
        timeout_s: float,
        alarm: Alarm,
    ) -> None:
        self._board = Board(store, timeout_s)
        self._rank = rank
        self._watch = Watch(watched, timeout_s)
        self._interval_s = interval_s
        self._look_s = min(look_s, interval_s)
        self._alarm = alarm
        self._stop = threading.Event()
        self.looks: list[Callable[[Board], None]] = []
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Beat once before returning, so that whoever opens a link to this worker later has a beat to miss."""
        self._board.post(_key(self._rank), 1)
        self._thread.start()

    def stop(self) -> None:
        """End; neighbours stop expecting beats from this worker."""
        self._stop.set()
        if self._thread.ident is not None:  # an error may have come before the start
            self._thread.join()

    def _run(self) -> None:
        count = 1
        next_beat = 0.0
        try:
            while not self._stop.wait(self._look_s):
                failure = self._board.find(FAILURE)
                if failure is not None:
                    self._alarm.ring(remote_error(failure))
                for look in tuple(self.looks):
                    look(self._board)
                if time.monotonic() >= next_beat:
                    count += 1
                    next_beat = time.monotonic() + self._interval_s
                    self._board.post(_key(self._rank), count)
                    for error in self._watch.silent(self._board).values():
                        self._alarm.ring(error)
            self._board.post(_key(self._rank), DONE)
        except StoreLostError as error:
            if not self._stop.is_set():
                self._alarm.ring(self._watch.cut_off(error))


@final
class Watch:
    """Notices workers whose beats stay away.

    Args:
        watched: rank -> "stage 1 (rank 1)".
        timeout_s: silence after which a worker is taken for dead.
    """

    def __init__(self, watched: Mapping[int, str], timeout_s: float) -> None:
        self._watched = watched
        self._timeout_s = timeout_s
        self._seen = {rank: (0, time.monotonic()) for rank in watched}

    def silent(self, board: Board) -> dict[int, LinkError]:
        """The workers that are taken for dead, each with the error that says so."""
        errors = {}
        for rank, name in self._watched.items():
            count = board.find(_key(rank)) or 0
            last, since = self._seen[rank]
            if count != last or count in (0, DONE):  # one that has not started yet has its own deadline at start
                self._seen[rank] = (count, time.monotonic())
            elif time.monotonic() - since > self._timeout_s:
                errors[rank] = LinkError(
                    f"{name} has given no sign of life for {self._timeout_s:.0f} s; "
                    "it was stopped, or its machine or network is gone"
                )
        return errors

    def expect_anew(self, board: Board, rank: int) -> None:
        """The worker at `rank` is being replaced: its replacement has not started yet."""
        board.post(_key(rank), 0)

    def cut_off(self, error: StoreLostError) -> StoreLostError:
        """Whoever is cut off cannot know which workers are: it says of whom it hears no more."""
        names = ", ".join(self._watched.values())
        return StoreLostError(f"{error}; without it nothing is heard of {names}") if names else error


class RemoteError(Exception):
    """Marks an error that another worker has reported already: nobody needs to report it again."""


def remote_error(note: Mapping[str, Any]) -> BaseException:
    """A failure note as an exception of the reported kind, raised from a `RemoteError`."""
    error = BY_NAME.get(str(note["type"]), LaunchError)(str(note["message"]))
    error.__cause__ = RemoteError(str(note["where"]))
    return error


def _key(rank: int) -> str:
    return f"beat/{rank}"
