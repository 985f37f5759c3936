"""The local launcher: one process a stage on this machine, under a supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import final

from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.engine.metrics import Sink
from pipetrgl.launchers.process import exit_now, serve
from pipetrgl.launchers.supervise import Budget, Supervisor, host_store
from pipetrgl.worker import Job

_HOST = "127.0.0.1"
_KILL_S = 5.0


def launch(job: Job, sink: Sink, budget: Budget) -> None:
    """Train in worker processes, one a stage; logs go to logs/stage-k.log in the run folder.

    Raises:
        PipetrglError: the first error of any worker that no replacement could mend; no process is left behind.
    """
    config = job.blueprint.config
    board = Board(host_store(_HOST, config.launcher.port), config.channel.heartbeat_timeout_s)
    Supervisor(job, board, _Processes(job, board.store.port), sink, budget).run()


@final
class _Processes:
    """The processes; only these are ever signalled."""

    def __init__(self, job: Job, port: int) -> None:
        self._job = job
        self._port = port
        self._newest: dict[int, subprocess.Popen[bytes]] = {}
        self._logs = job.run / "logs"
        self._logs.mkdir(exist_ok=True)
        self._environ = worker_environ(job.environ, job.blueprint.config.train.threads)

    def start(self, rank: int, incarnation: int) -> None:
        arguments = [str(self._job.run), str(rank), str(incarnation), str(self._port)]
        with self._log(rank).open("ab") as log:
            self._newest[rank] = subprocess.Popen(
                [sys.executable, "-m", "pipetrgl.launchers.local", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                # a session of its own, so that Ctrl-C reaches this process alone, which then ends them in order
                start_new_session=True,
            )

    def ending(self, rank: int) -> str | None:
        process = self._newest[rank]
        code = process.poll()
        if code is None or code == 0:
            return None if code is None else ""
        if code < 0:
            return f"process {process.pid}, was killed by {signal.Signals(-code).name}"
        return f"process {process.pid}, ended with exit code {code} before it could say why; see {self._log(rank)}"

    def kill(self, rank: int) -> None:
        self._newest[rank].kill()
        wait_for([self._newest[rank]], _KILL_S)

    def end(self) -> None:
        alive = [process for process in self._newest.values() if process.poll() is None]
        for process in alive:
            process.kill()
        wait_for(alive, _KILL_S)

    def _log(self, rank: int) -> Path:
        return self._logs / f"stage-{rank}.log"


def worker_environ(environ: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """The environment of a worker process that this one starts."""
    threads = str(num_threads)
    # the thread count must hold from torch's import on; a package that is not installed is found as here
    return {
        **environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS refuses deterministic algorithms without it
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def wait_for(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Collect processes that are ending, for so long in all."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    client = TCPStore(_HOST, int(sys.argv[4]), is_master=False, timeout=timedelta(seconds=30))
    rank = int(sys.argv[2])
    exit_now(serve(Path(sys.argv[1]), rank, int(sys.argv[3]), client, _HOST, local_rank=rank))
