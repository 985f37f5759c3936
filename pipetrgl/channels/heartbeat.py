"""Heartbeats: each worker counts up in the run's store, and its neighbours notice when it stops.

The first failure of a run spreads the same way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
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
        timeout_s: silence after which a worker is taken for dead.
        alarm: rung.
    """

    def __init__(
        self, store: Store, rank: int, watched: Mapping[int, str], interval_s: float, timeout_s: float, alarm: Alarm
    ) -> None:
        self._board = Board(store, timeout_s)
        self._rank = rank
        self._watched = watched
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._alarm = alarm
        self._stop = threading.Event()
        self._seen = {peer: (0, time.monotonic()) for peer in watched}
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
            while not self._stop.wait(min(0.25, self._interval_s)):
                failure = self._board.find(FAILURE)
                if failure is not None:
                    self._alarm.ring(remote_error(failure))
                if time.monotonic() >= next_beat:
                    count += 1
                    next_beat = time.monotonic() + self._interval_s
                    self._board.post(_key(self._rank), count)
                    self._look_at_neighbours()
            self._board.post(_key(self._rank), DONE)
        except StoreLostError as error:
            if not self._stop.is_set():
                self._alarm.ring(self._with_neighbours(error))

    def _look_at_neighbours(self) -> None:
        for peer, name in self._watched.items():
            count = self._board.find(_key(peer)) or 0
            last, since = self._seen[peer]
            if count != last or count in (0, DONE):  # one that has not started yet has its own deadline at start
                self._seen[peer] = (count, time.monotonic())
            elif time.monotonic() - since > self._timeout_s:
                self._alarm.ring(
                    LinkError(
                        f"{name} has given no sign of life for {self._timeout_s:.0f} s; "
                        "it was stopped, or its machine or network is gone"
                    )
                )

    def _with_neighbours(self, error: StoreLostError) -> StoreLostError:
        """Whoever is cut off cannot know which of its neighbours are: it says of whom it hears no more."""
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
