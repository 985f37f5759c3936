"""The file of rows, also where there is no room for it."""

from __future__ import annotations

import json
import logging
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetrgl.engine.rowfile import RowFile


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def no_more_than() -> Iterator[object]:
    """Sets how large a file this process may write; as on a full disk, a longer write fails with OSError."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(
    tmp_path: Path, no_more_than: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(no_more_than)
    monkeypatch.setattr(logging.getLogger("pipetrgl"), "propagate", True)
    file = RowFile(tmp_path / "rows")
    file.append({"step": 1})  # 12 bytes
    no_more_than(18)  # half a row more
    file.append({"step": 2})
    file.append({"step": 3})
    assert rows(tmp_path / "rows") == [{"step": 1}]  # no half row
    assert caplog.text.count("could not be written") == 1  # not once a row
    no_more_than(None)
    file.append({"step": 4})
    file.close()
    assert rows(tmp_path / "rows") == [{"step": step} for step in (1, 2, 3, 4)]


def test_going_back_drops_later_rows_and_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n[4]\n{"ste')
    file = RowFile(path)
    assert file.rewind(lambda row: row["step"] <= 2) == [{"step": 1}, {"step": 2}]
    file.append({"step": 3, "again": True})
    file.close()
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
