"""The stopwatch of one worker in one turn: when each batch was done, and what was done when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final


@final
@dataclass(frozen=True)
class Account:
    """What one worker says of the measured window of a turn; see `Measurement`."""

    seconds: float
    wait_share: float | None
    cpu_s: float
    sent_bytes: int


class Entry(NamedTuple):
    """A `Span` without its worker, as it goes over the board."""

    name: str
    start_s: float
    end_s: float
    batch: int


@final
@dataclass(frozen=True)
class _Mark:
    time_s: float
    cpu_s: float
    waited_s: float | None
    sent_bytes: int


@final
class Stopwatch:
    """Marks and spans of a turn; times are this process's `time.perf_counter()`, on Linux the machine's.

    mark   b0   mark   b1   mark   b2   mark        warm_up = 1: the window opens when batch 0 is done
                └────────── window ───────┘
    """

    def __init__(self, warm_up: int) -> None:
        self.spans: list[Entry] = []
        self._warm_up = warm_up
        self._marks: list[_Mark] = []

    def mark(self, waited_s: float | None, sent_bytes: int) -> None:
        """The turn begins, or a batch is done.

        Args:
            waited_s: total so far, from any start; None where it is not known.
            sent_bytes: likewise.
        """
        self._marks.append(_Mark(time.perf_counter(), time.process_time(), waited_s, sent_bytes))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Of the batch at hand."""
        start = time.perf_counter()
        yield
        self.add(name, start, time.perf_counter())

    def call(self, rest: str, function: Callable[[], Any]) -> float:
        """Run `function`; what no span inside of it covers becomes spans called `rest`. Returns their seconds."""
        at, before = time.perf_counter(), len(self.spans)
        function()
        gaps = []
        for span in self.spans[before:]:
            gaps.append((at, span.start_s))
            at = span.end_s
        gaps.append((at, time.perf_counter()))
        for start_s, end_s in gaps:
            self.add(rest, start_s, end_s)
        return sum(end_s - start_s for start_s, end_s in gaps)

    def add(self, name: str, start_s: float, end_s: float) -> None:
        """A span of the batch at hand."""
        self.spans.append(Entry(name, start_s, end_s, len(self._marks) - 1))

    def add_events(self, events: list[dict[str, Any]], first_step: int) -> None:
        """The spans of an engine's `Trace` that began at `first_step`."""
        for event in events:
            if event["ph"] == "X":
                start_s, step = event["ts"] / 1e6, event["args"]["step"]
                self.spans.append(Entry(event["name"], start_s, start_s + event["dur"] / 1e6, step - first_step))

    def account(self) -> Account | None:
        """Of the window, once the turn is over; None where this worker took no part."""
        if not self._marks:
            return None
        first, last = self._marks[self._warm_up], self._marks[-1]
        seconds = last.time_s - first.time_s
        waits = first.waited_s is not None and last.waited_s is not None
        return Account(
            seconds=seconds,
            wait_share=(last.waited_s - first.waited_s) / seconds if waits else None,  # type: ignore[operator]
            cpu_s=last.cpu_s - first.cpu_s,
            sent_bytes=last.sent_bytes - first.sent_bytes,
        )
