"""The board: small JSON notes that workers of a run leave for each other in the run's store."""

from __future__ import annotations

import json
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, final

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import Store, store_address
from pipetrgl.errors import LaunchError, LinkError

_POLL_S = 0.02


@final
class Board:
    """Notes by name; a note is any JSON.

    A store's client has no deadline of its own: once the network to the store is cut, a call in it comes back when TCP
    gives up, a quarter of an hour later. So a thread makes the calls, one at a time, and the caller waits for it only
    so long. A board has no call that waits inside the store: it would hold up all others.

    Args:
        store: a client; a call of somebody else's that waits in it holds up the board.
        timeout_s: how long the store may take to answer.

    Raises:
        StoreLostError: from every method, when the store has gone or gives no answer.
    """

    def __init__(self, store: Store, timeout_s: float) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=_make_calls, args=(self._calls,), name="board", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)  # the thread ends with the board

    def post(self, name: str, note: Any) -> None:
        self._ask(lambda: self.store.set(name, json.dumps(note)))

    def post_first(self, name: str, note: Any) -> None:
        """Post unless somebody did already."""
        self._ask(lambda: self.store.compare_set(name, "", json.dumps(note)))

    def find(self, name: str) -> Any | None:
        """The note, or None if there is none yet."""
        text = self._ask(lambda: self.store.get(name) if self.store.check([name]) else None)
        return None if text is None else json.loads(text)

    def take(self, name: str) -> Any | None:
        """The note, removed; None if there is none yet."""
        note = self.find(name)
        if note is not None:
            self._ask(lambda: self.store.delete_key(name))
        return note

    def read(self, name: str, timeout_s: float, alarm: Alarm, what: str) -> Any:
        """Wait for a note.

        Raises:
            LinkError: none after `timeout_s`: "waited N s for {what}".
            BaseException: the alarm rang.
        """
        deadline = time.monotonic() + timeout_s
        while (note := self.find(name)) is None:
            alarm.check()
            if time.monotonic() > deadline:
                raise LinkError(f"waited {timeout_s:.0f} s for {what}")
            time.sleep(_POLL_S)
        return note

    def _ask(self, ask_store: Callable[[], Any]) -> Any:
        call = _Call(ask_store)
        self._calls.put(call)
        if not call.answered.wait(self.timeout_s):
            raise StoreLostError(
                f"the run's store at {store_address(self.store)} has given no answer for {self.timeout_s:.0f} s; "
                "its host was stopped, or its machine or network is gone"
            )
        if call.error is not None:
            raise StoreLostError(
                f"lost the run's store at {store_address(self.store)}: the launcher that hosts it has died"
            ) from call.error
        return call.answer


class StoreLostError(LaunchError):
    """Nothing can be said to, or heard from, any other worker."""


@final
class _Call:
    """A call of the store for the board's thread to make."""

    def __init__(self, ask_store: Callable[[], Any]) -> None:
        self._ask_store = ask_store
        self.answered = threading.Event()
        self.answer: Any = None
        self.error: RuntimeError | None = None

    def make(self) -> None:
        try:
            self.answer = self._ask_store()
        except RuntimeError as error:  # every failure of a store is one
            self.error = error
        self.answered.set()


def _make_calls(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.make()
        del call  # it knows its board, which would never end
