"""How a run is asked to end, and how its workers are let go: signals of a process, notes on the run's board."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.errors import Interrupted

_STOP, _RELEASE = "stop", "release"
_POLL_S = 0.05
# One request may come as several signals: a scheduler sends one to every process of a job while its agent hands it on,
# and Linux sends a parent-death signal again for every thread with which the parent dies.
_ONE_REQUEST_S = 1.0


def stop_on_signals(stop: threading.Event, say: Callable[[str], None] | None = None) -> None:
    """Let SIGTERM and SIGUSR1 (Slurm's warning) ask for an end at the next step, with a checkpoint; a second one, a
    second later or more, ends the run at once.

    Args:
        stop: set by the first signal.
        say: told what the first signal does; called from the signal's handler.
    """

    asked: float | None = None  # when; `stop` may also be set by another process that was asked

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked < _ONE_REQUEST_S:
                return
            raise Interrupted(f"ended by {signal.Signals(number).name}")
        asked = time.monotonic()
        stop.set()
        if say is not None:
            say(f"{signal.Signals(number).name}: saving a checkpoint and ending; a second signal ends the run at once")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)


def share_stop(stop: threading.Event, board: Board) -> None:
    """Hand on a signal that this process got, or learn of one that another process of the run got."""
    if stop.is_set():
        board.post(_STOP, {})
    elif board.find(_STOP) is not None:
        stop.set()


def release(board: Board) -> None:
    """Let all supervised workers leave."""
    board.post(_RELEASE, {})


def await_release(board: Board, alarm: Alarm) -> None:
    """Stay, with all links, until every worker is done: a neighbour may still have to be replaced."""
    while board.find(_RELEASE) is None:
        alarm.check()
        time.sleep(_POLL_S)
