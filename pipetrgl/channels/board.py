"""The board: small JSON notes that workers of a run leave for each other in the run's store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, final

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import Store
from pipetrgl.errors import LinkError

_POLL_S = 0.02


@final
class Board:
    """Notes by name. Never blocks inside the store: a blocked client would hold up the heartbeat as well."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def post(self, name: str, note: Mapping[str, Any] | list[Any]) -> None:
        self.store.set(name, json.dumps(note))

    def post_first(self, name: str, note: Mapping[str, Any]) -> None:
        """Post unless somebody did already."""
        self.store.compare_set(name, "", json.dumps(note))

    def find(self, name: str) -> Any | None:
        """The note, or None if there is none yet."""
        return json.loads(self.store.get(name)) if self.store.check([name]) else None

    def take(self, name: str) -> Any | None:
        """The note, removed; None if there is none yet."""
        note = self.find(name)
        if note is not None:
            self.store.delete_key(name)
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
