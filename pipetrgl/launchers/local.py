"""The local launcher: starts one process a stage on this machine, watches them, and ends them all together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import Store, TCPStore
from pipetrgl.channels.heartbeat import FAILURE, Heartbeat, remote_error
from pipetrgl.config.load import load
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint
from pipetrgl.engine.metrics import Sink
from pipetrgl.errors import Interrupted, LaunchError, PipetrglError
from pipetrgl.launchers.process import (
    Collector,
    Membership,
    end_on_signals,
    exit_now,
    failure_note,
    name_of,
    run_process,
)
from pipetrgl.logs import log_to_stderr
from pipetrgl.worker import Job
from pipetrgl.world import Place

_HOST = "127.0.0.1"
_POLL_S = 0.05
_GRACE_S = 5.0


def launch(job: Job, sink: Sink) -> None:
    """Train in worker processes, one a stage; logs go to logs/stage-k.log in the run folder.

    Raises:
        PipetrglError: the first error of any worker; no process is left behind.
    """
    config = job.blueprint.config
    board = Board(_host_store(config.launcher.port), config.channel.heartbeat_timeout_s)
    board.post("spec", job.blueprint.spec.to_dict())
    board.post("checkpoint", job.checkpoint.to_dict() if job.checkpoint else {})
    workers = _Workers(job, board.store.port)
    collector = Collector(board, job.blueprint.world.size, sink)
    alarm = Alarm()
    names = {rank: name_of(job.blueprint.world.place(rank)) for rank in range(job.blueprint.world.size)}
    channel = config.channel
    watch = Heartbeat(board.store.clone(), -1, names, channel.heartbeat_s, channel.heartbeat_timeout_s, alarm)
    try:
        workers.start()
        watch.start()
        while not workers.all_done():
            collector.poll()
            workers.check(board)
            alarm.check()
            time.sleep(_POLL_S)
        collector.poll()
    except BaseException as error:
        place = Place(-1, -1, 0)
        board.post_first(FAILURE, failure_note(error, place))
        workers.await_end(_GRACE_S, collector)
        failure = board.find(FAILURE)
        assert failure is not None, "posted above, if not by a worker"
        _keep_traceback(job.run, failure)
        raise remote_error(failure) from error
    finally:
        workers.end()
        watch.stop()


@final
class _Workers:
    """The processes; only these are ever signalled."""

    def __init__(self, job: Job, port: int) -> None:
        self._job = job
        self._port = port
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        logs = self._job.run / "logs"
        logs.mkdir(exist_ok=True)
        threads = str(self._job.blueprint.config.train.threads)
        # the thread count must hold from torch's import on; a package that is not installed is found as here
        environ = {
            **self._job.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS refuses deterministic algorithms without it
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        for rank in range(self._job.blueprint.world.size):
            with (logs / f"stage-{rank}.log").open("ab") as log:
                arguments = [str(self._job.run), str(rank), str(self._port)]
                command = [sys.executable, "-m", "pipetrgl.launchers.local", *arguments]
                self._processes.append(
                    # a session of its own, so that Ctrl-C reaches this process alone, which then ends them in order
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
                    )
                )

    def all_done(self) -> bool:
        return all(process.poll() == 0 for process in self._processes)

    def check(self, board: Board) -> None:
        """Raises:
        LaunchError: a worker ended before its time, with its own account of why if it left one.
        """
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is None or code == 0:
                continue
            note = board.find(FAILURE)
            if note is not None:
                raise remote_error(note)
            who = f"{name_of(self._job.blueprint.world.place(rank))}, process {process.pid},"
            if code < 0:
                raise LaunchError(f"{who} was killed by {signal.Signals(-code).name}")
            raise LaunchError(
                f"{who} ended with exit code {code} before it could say why; see {self._job.run}/logs/stage-{rank}.log"
            )

    def await_end(self, seconds: float, collector: Collector) -> None:
        """Give the workers time to notice the failure and to post their last rows."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            collector.poll()
            time.sleep(_POLL_S)
        collector.poll()

    def end(self) -> None:
        """End whatever is still there."""
        for kill in (subprocess.Popen.terminate, subprocess.Popen.kill):
            alive = [process for process in self._processes if process.poll() is None]
            for process in alive:
                kill(process)
            _wait_for(alive, 2.0)


def _wait_for(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue


def _host_store(port: int) -> Store:
    try:
        return TCPStore(_HOST, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    except RuntimeError as error:
        reason = "it is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise LaunchError(
            f"launcher.port: cannot listen on port {port}: {reason}; choose another, or 0 for a free one"
        ) from error


def _keep_traceback(run: Path, note: dict[str, Any]) -> None:
    if note["traceback"]:
        folder = run / "errors"
        folder.mkdir(exist_ok=True)
        name = f"stage-{note['stage']}.txt" if note["stage"] >= 0 else "launcher.txt"
        (folder / name).write_text(f"{note['message']}\n\n{note['traceback']}", encoding="utf-8")


def _worker(run: Path, rank: int, port: int) -> None:
    """The main of a worker process."""
    end_on_signals()
    store = TCPStore(_HOST, port, is_master=False, timeout=timedelta(seconds=30))
    board = Board(store, 30.0)
    try:
        spec = DataSpec.from_dict(board.read("spec", 30.0, Alarm(), "the launcher's data specification"))
        checkpoint = Checkpoint.from_dict(board.read("checkpoint", 30.0, Alarm(), "the launcher's checkpoint"))
        blueprint = draw_up(load(run / "config.yaml"), spec)
        place = blueprint.world.place(rank)
        log_to_stderr()
        device = torch.device(blueprint.config.pipeline.device)
        if device.type == "cuda":
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        run_process(Job(blueprint, run, dict(os.environ), checkpoint), Membership(store, place, device, _HOST))
    except Interrupted:
        exit_now(Interrupted.exit_code)
    except PipetrglError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_now(error.exit_code)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
