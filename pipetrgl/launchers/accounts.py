"""Accounts: a worker's error as others will read it, and whose error is the run's."""

from __future__ import annotations

import time
import traceback
from typing import Any

from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.heartbeat import FAILURE, RemoteError, remote_error
from pipetrgl.channels.link import LostPeerError
from pipetrgl.errors import Interrupted, LaunchError, PipetrglError
from pipetrgl.launchers.membership import Membership, name_of
from pipetrgl.world import Place

_GRACE_S = 3.0  # how long a worker that lost its neighbour waits for the neighbour's own account


def account_of(board: Board, rank: int, incarnation: int) -> dict[str, Any] | None:
    """Why a supervised worker ended, in its own words."""
    note: dict[str, Any] | None = board.find(_account(rank, incarnation))
    return note


def _account(rank: int, incarnation: int) -> str:
    return f"account/{rank}/{incarnation}"


def report(error: BaseException, board: Board, member: Membership) -> BaseException:
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
