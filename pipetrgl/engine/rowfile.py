"""The file of rows, `metrics.jsonl`: one JSON object a line, every line whole."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import final

from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.engine.metrics import Row

logger = logging.getLogger(__name__)


@final
class RowFile:
    """Appends rows at once; those that a full disk refuses are kept, and written when there is room again.

    Args:
        path: of the file; what it holds stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._file = path.open("ab", buffering=0)

    def append(self, row: Row) -> None:
        self._waiting.append(json.dumps(row).encode() + b"\n")
        refused_before = len(self._waiting) > 1
        try:
            while self._waiting:
                self._append_whole(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not refused_before:
                logger.warning("%s could not be written (%s); training goes on", self._path, error)

    def rewind(self, precedes: Callable[[Row], bool]) -> list[Row]:
        """Keep only the rows for which `precedes` holds, without a last line that is not whole; returns them."""
        self._file.close()
        self._waiting.clear()
        kept = [row for row in map(_read, self._path.read_bytes().splitlines()) if row is not None and precedes(row)]
        write_atomically(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))
        self._file = self._path.open("ab", buffering=0)
        return kept

    def close(self) -> None:
        self._file.close()
        if self._waiting:
            logger.warning("%s lacks its last %d rows", self._path, len(self._waiting))

    def _append_whole(self, line: bytes) -> None:
        start = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), start)
            raise


def _read(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
