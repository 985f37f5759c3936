"""Rows on their way from the workers to whoever leads the run, through the run's store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import final

from pipetrgl.channels.board import Board
from pipetrgl.engine.metrics import Row, Sink


@final
class BoardSink:
    """Posts rows for whoever leads the run; numbered, so that none is lost or read twice."""

    def __init__(self, board: Board, rank: int, incarnation: int) -> None:
        self._board = board
        self._prefix = _rows(rank, incarnation)
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, row: Row) -> None:
        with self._lock:
            self._board.post(f"{self._prefix}/{self._count}", row)
            self._count += 1


@final
class Collector:
    """Reads the rows that the workers posted, in each worker's order."""

    def __init__(self, board: Board, world_size: int) -> None:
        self._board = board
        self._counts = [0] * world_size
        self._incarnations = [0] * world_size
        self._ended: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every worker has posted its last row."""
        return len(self._ended) == len(self._counts)

    def poll(self) -> Iterator[tuple[int, Row]]:
        """Every new row with the rank that posted it."""
        for rank in range(len(self._counts)):
            yield from self._rows_of(rank)

    def expect_anew(self, rank: int) -> Iterator[tuple[int, Row]]:
        """The last rows of a worker that has died; from now on, those of its replacement are read."""
        yield from self._rows_of(rank)
        self._ended.discard(rank)
        self._counts[rank] = 0
        self._incarnations[rank] += 1

    def _rows_of(self, rank: int) -> Iterator[tuple[int, Row]]:
        prefix = _rows(rank, self._incarnations[rank])
        while (row := self._board.take(f"{prefix}/{self._counts[rank]}")) is not None:
            self._counts[rank] += 1
            if row["kind"] == "end":
                self._ended.add(rank)
            else:
                yield rank, row


def _rows(rank: int, incarnation: int) -> str:
    return f"rows/{rank}/{incarnation}"


@final
class ForwardLogs(logging.Handler):
    """Shows warnings of a worker to the user as well, who does not read the workers' log files."""

    def __init__(self, sink: Sink, stage: int) -> None:
        super().__init__(logging.WARNING)
        self._sink = sink
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        self._sink({"kind": "log", "stage": self._stage, "level": record.levelname, "message": record.getMessage()})
