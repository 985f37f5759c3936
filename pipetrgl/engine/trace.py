"""The trace: spans of compute, send and wait of one worker in a window of steps, as Chrome trace events.

The loop is not touched: its stage, inbox and outbox are wrapped. Times are the host's; on a GPU they show when work was
queued, not when it ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, final

from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.engine.loop import Trainee
from pipetrgl.engine.metrics import Sink
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput

Event = dict[str, Any]


@final
class Trace:
    """Records spans of steps `first_step : first_step + num_steps`.

    Args:
        rank, name: of the worker, its row in the picture.
        clock_offset_s: added to `time.perf_counter()` to give rank 0's clock.
    """

    def __init__(self, first_step: int, num_steps: int, rank: int, name: str, clock_offset_s: float) -> None:
        self._steps = range(first_step, first_step + num_steps)
        self._rank = rank
        self._name = name
        self._offset_s = clock_offset_s
        self._events: list[Event] = []

    def call(self, name: str, category: str, micro_batch: MicroBatch, function: Callable[[], Any]) -> Any:
        """Run `function` inside a span."""
        if micro_batch.step not in self._steps:
            return function()
        start = time.perf_counter()
        result = function()
        self.add(name, category, micro_batch, start)
        return result

    def add(self, name: str, category: str, micro_batch: MicroBatch, start: float) -> None:
        """A span from `start` (this process's `time.perf_counter()`) until now."""
        if micro_batch.step not in self._steps:
            return
        self._events.append(
            {
                "name": name,
                "cat": category,
                "ph": "X",
                "ts": round((start + self._offset_s) * 1e6, 1),
                "dur": round((time.perf_counter() - start) * 1e6, 1),
                "pid": self._rank,
                "tid": 0,
                "args": {"step": micro_batch.step, "index": micro_batch.index, "split": micro_batch.split.label},
            }
        )

    def events(self) -> list[Event]:
        """Everything recorded, with the row's name first; empty if no span fell into the window."""
        if not self._events:
            return []
        title = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": self._name}}
        return [title, *self._events]


@final
class TracedStage:
    """A stage whose forward, backward and update are spans."""

    def __init__(self, stage: Trainee, trace: Trace) -> None:
        self._stage = stage
        self._trace = trace
        self._current: MicroBatch | None = None

    @property
    def index(self) -> int:
        return self._stage.index

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        output: StageOutput = self._trace.call(
            "forward", "compute", micro_batch, lambda: self._stage.forward(micro_batch, train)
        )
        return output

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self._current = micro_batch
        self._trace.call("backward", "compute", micro_batch, lambda: self._stage.backward(output, micro_batch))

    def update(self) -> None:
        assert self._current is not None, "update follows a backward"
        micro_batch, self._current = self._current, None
        self._trace.call("update", "compute", micro_batch, self._stage.update)


@final
class TracedInbox:
    """An inbox whose waits are spans."""

    def __init__(self, inbox: Inbox, trace: Trace) -> None:
        self._inbox = inbox
        self._trace = trace

    @property
    def waited_s(self) -> float:
        return self._inbox.waited_s

    def __iter__(self) -> Iterator[MicroBatch]:
        stream = iter(self._inbox)
        while True:
            start = time.perf_counter()
            micro_batch = next(stream, None)
            if micro_batch is None:
                return
            self._trace.add("wait", "wait", micro_batch, start)
            yield micro_batch
            del micro_batch

    def close(self) -> None:
        self._inbox.close()


@final
class TracedOutbox:
    """An outbox whose sends are spans; a send that blocks is a wait for the receiver."""

    def __init__(self, outbox: Outbox, trace: Trace) -> None:
        self._outbox = outbox
        self._trace = trace

    @property
    def waited_s(self) -> float:
        return self._outbox.waited_s

    @property
    def sent_bytes(self) -> int:
        return self._outbox.sent_bytes

    @property
    def received_index(self) -> int:
        return self._outbox.received_index

    def send(self, micro_batch: MicroBatch) -> None:
        self._trace.call("send", "send", micro_batch, lambda: self._outbox.send(micro_batch))

    def close(self) -> None:
        self._outbox.close()


@final
class TraceHook:
    """Hands the events to the sink when the stream has ended."""

    def __init__(self, trace: Trace, stage: int, sink: Sink) -> None:
        self._trace = trace
        self._stage = stage
        self._sink = sink

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        pass

    def close(self) -> None:
        if events := self._trace.events():
            self._sink({"kind": "trace", "stage": self._stage, "events": events})
