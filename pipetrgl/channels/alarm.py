"""The alarm: the first error that any thread of a worker learns of, and waits that it can interrupt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from pipetrgl.errors import StalledError

_POLL_S = 0.25
"""Between two looks at the alarm; what is waited for wakes at once."""


@final
class Alarm:
    """Keeps the first error; `check` raises it in whichever thread asks.

    Attributes:
        paused: a stage of the run is being replaced, so nobody can expect progress: no deadline runs.
    """

    def __init__(self) -> None:
        self.paused = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def ring(self, error: BaseException) -> None:
        """Remember `error` unless there is one already."""
        with self._lock:
            self._error = self._error or error

    @property
    def rang(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raises:
        BaseException: the error that was rung, if any.
        """
        if self._error is not None:
            raise self._error


def wait_until(
    condition: threading.Condition, ready: Callable[[], bool], alarm: Alarm, timeout_s: float, what: str
) -> float:
    """Block, holding `condition`, until `ready()`; returns the seconds waited.

    Raises:
        StalledError: `timeout_s` passed; the message is "waited N s for {what}".
        BaseException: the alarm rang meanwhile.
    """
    if ready():
        return 0.0
    start = since = time.perf_counter()
    while not ready():
        alarm.check()
        if alarm.paused:
            since = time.perf_counter()
        if time.perf_counter() - since > timeout_s:
            raise StalledError(f"waited {timeout_s:.0f} s for {what}; it is alive but gives no sign of progress")
        condition.wait(_POLL_S)
    return time.perf_counter() - start
