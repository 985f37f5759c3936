"""When something goes wrong: the first error of any worker ends the run everywhere, with that error, within seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board, StoreLostError
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.channels.heartbeat import Heartbeat
from pipetrgl.errors import LaunchError, LinkError
from pipetrgl.launchers.torchrun import own_address
from pipetrgl.stage import Stage
from tests.equivalence.runs import run, tiny
from tests.failure.conftest import Start
from tests.failure.pipelines import ENDLESS


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_worker_ends_the_run_and_is_named(start: Start, stage: int) -> None:
    pipeline = start(**ENDLESS)
    pipeline.wait_for_step(5, stage=2)
    pipeline.kill(stage)
    code, errors = pipeline.finish()
    assert code == 3
    assert f"stage {stage} (rank {stage}), process" in errors
    assert "was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    result = pipeline.result()
    assert result["status"] == "failed"
    assert f"stage {stage}" in result["error"]


def test_a_stopped_worker_is_named_when_its_heartbeat_stays_away(start: Start) -> None:
    pipeline = start("channel.heartbeat_s=0.2", "channel.heartbeat_timeout_s=2", **ENDLESS)
    pipeline.wait_for_step(5, stage=2)
    pipeline.kill(1, signal.SIGSTOP)
    code, errors = pipeline.finish()
    assert code == 3
    assert "stage 1 (rank 1) has given no sign of life for 2 s" in errors


def test_ctrl_c_ends_every_worker_and_leaves_a_usable_run_folder(start: Start) -> None:
    pipeline = start(**ENDLESS)
    pipeline.wait_for_step(5, stage=2)
    struck = time.monotonic()
    os.kill(pipeline.process.pid, signal.SIGINT)
    code, errors = pipeline.finish()
    assert code == 130
    assert errors == "error: interrupted\n"
    assert time.monotonic() - struck < 30  # "within seconds", on a machine that may be busy
    result = pipeline.result()
    assert result["status"] == "interrupted"
    assert result["num_steps"] > 0
    subprocess.run([sys.executable, "-m", "pipetrgl", "report", str(pipeline.run)], check=True, capture_output=True)
    assert (pipeline.run / "report.html").exists()


def test_workers_end_when_their_supervisor_is_killed(start: Start) -> None:
    pipeline = start(**ENDLESS)
    pipeline.wait_for_step(5, stage=2)
    os.kill(pipeline.process.pid, signal.SIGKILL)
    pipeline.process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while pipeline.workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pipeline.workers() == {}


def test_a_worker_that_dies_at_start_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '1' in sys.orig_argv[-3:-2]: raise SystemExit('broken')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # the launcher hands its own module path to the workers
    with pytest.raises(
        LaunchError, match=r"stage 1 \(rank 1\), process \d+, ended with exit code 1 before it could say"
    ):
        run(tiny("mlp", tmp_path, pipeline={"stages": 3}))


def test_a_port_in_use_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"launcher.port: cannot listen on port {port}: it is in use"):
            run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"port": port}))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_in_one_thread_ends_the_others(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Stage.update

    def fail_at(self: Stage) -> None:
        if (self.index, self.num_updates) == (stage, 7):
            raise ValueError(f"injected into stage {stage}")
        update(self)

    monkeypatch.setattr(Stage, "update", fail_at)
    with pytest.raises(ValueError, match=f"injected into stage {stage}"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 3}, launcher={"name": "threads"}))


def test_an_error_in_the_loader_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipetrgl.data import loader

    def broken(*arguments: object, **more: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader, "normalise", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"name": "threads"}))


def test_a_lost_store_rings_the_alarm() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", store.port, is_master=False)
    alarm = Alarm()
    heartbeat = Heartbeat(client, 0, {}, 0.05, 0.05, 1.0, alarm)
    heartbeat.start()
    del store
    deadline = time.monotonic() + 10
    while not alarm.rang and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(LaunchError, match="lost the run's store"):
        alarm.check()
    heartbeat.stop()


def test_a_loopback_address_is_refused_when_some_ranks_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29400", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert own_address(world_size=2) == "127.0.0.1"
    with pytest.raises(LaunchError, match="MASTER_ADDR 'localhost' for its own loopback address"):
        own_address(world_size=4)


class SilentStore:
    """A store behind a cut cable: takes what it is given, and never answers."""

    host, port = "10.77.0.1", 29400

    def __init__(self) -> None:
        self.over = threading.Event()

    def set(self, name: str, value: str) -> None:
        pass

    def check(self, names: list[str]) -> bool:
        self.over.wait()
        return False


def test_a_silent_store_rings_the_alarm_and_the_neighbours_are_named() -> None:
    store, alarm = SilentStore(), Alarm()
    heartbeat = Heartbeat(store, 0, {1: "stage 1 (rank 1)"}, 0.05, 0.05, 0.2, alarm)
    heartbeat.start()
    deadline = time.monotonic() + 20
    while not alarm.rang and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(LaunchError, match="store at 10.77.0.1:29400 has given no answer for 0 s.*of stage 1 .rank 1."):
        alarm.check()
    heartbeat.stop()
    store.over.set()


def test_every_call_of_a_silent_store_has_a_deadline_and_a_boards_thread_ends_with_it() -> None:
    store = SilentStore()
    board = Board(store, 0.1)
    for _ in range(2):  # the second waits behind the first
        with pytest.raises(StoreLostError, match="no answer"):
            board.find("worker/1")
    before = threading.active_count()
    store.over.set()
    del board
    deadline = time.monotonic() + 20
    while threading.active_count() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() < before


def test_a_missing_note_is_waited_for_until_the_deadline() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(LinkError, match="waited 0 s for stage 2 to start"):
        Board(store, 10.0).read("worker/2", 0.1, Alarm(), "stage 2 to start")
