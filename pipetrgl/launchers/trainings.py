"""Many trainings, a few at a time, each in a process of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipetrgl.config.load import load
from pipetrgl.engine.metrics import Row
from pipetrgl.errors import DivergedError, Interrupted, LaunchError, PipetrglError, StoppedError
from pipetrgl.launchers.local import wait_for, worker_environ
from pipetrgl.launchers.signals import stop_on_signals
from pipetrgl.launchers.start import train
from pipetrgl.logs import log_to_stderr

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_STOP_S = 60.0  # for an optimizer step and a checkpoint
_KILL_S = 5.0
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


@dataclass(frozen=True)
class Training:
    """One training to be run.

    Attributes:
        name: for messages.
        config: the file of its config.
        threads: intra-op threads of its process.
    """

    name: str
    config: Path
    threads: int

    @property
    def log(self) -> Path:
        """Where its process writes, beside the config."""
        return self.config.with_suffix(".log")


Ended = Callable[[Training, bool, float], None]


def run_all(trainings: Sequence[Training], jobs: int, ended: Ended, stop: threading.Event) -> None:
    """Run every training, `jobs` of them at the same time.

    Args:
        ended: told of each one that has ended, whether it ended well (else it diverged), and its seconds.
        stop: once set, those at work save and end, and no other starts.
    Raises:
        StoppedError: `stop` was set; all can go on.
        LaunchError: one failed, and not by diverging; no process is left behind.
    """
    waiting = list(trainings)
    working: dict[Training, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while (waiting or working) and not stop.is_set():
            while waiting and len(working) < jobs:
                working[waiting[0]] = _start(waiting[0]), time.monotonic()
                del waiting[0]
            for training, (process, since) in list(working.items()):
                code = process.poll()
                if code is None:
                    continue
                del working[training]
                if code not in (0, DivergedError.exit_code):
                    raise LaunchError(f"{training.name}: {_why(training, code)}; log: {training.log}")
                ended(training, code == 0, time.monotonic() - since)
            time.sleep(_POLL_S)
    finally:
        _end([process for process, _ in working.values()])
    if stop.is_set():
        raise StoppedError("stopped; the same command goes on")


def last_words(training: Training) -> str:
    """The last line of a training's log: its error, if it ended with one."""
    lines = training.log.read_text(encoding="utf-8", errors="replace").splitlines() if training.log.exists() else []
    return lines[-1].partition("error: ")[2] or lines[-1] if lines else "it wrote nothing"


def _start(training: Training) -> subprocess.Popen[bytes]:
    with training.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipetrgl.launchers.trainings", str(training.config), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=worker_environ(os.environ, training.threads),
            # a session of its own, so that Ctrl-C reaches this process alone, which then ends them in order
            start_new_session=True,
        )


def _why(training: Training, code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return last_words(training)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask each process to save and end; kill what has not ended in time, or at once on Ctrl-C."""
    for process in processes:
        process.terminate()
    try:
        wait_for(processes, _STOP_S)
    finally:
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            process.kill()
        wait_for(alive, _KILL_S)


def _main(config: Path, parent: int) -> int:
    """The whole life of a training's process; returns its exit code."""
    stop = threading.Event()
    stop_on_signals(stop)
    _end_with(parent)
    log_to_stderr()
    try:
        train(load(config), lambda blueprint, run: _discard, stop)
    except (KeyboardInterrupt, Interrupted) as error:
        logger.info("%s", error)
        return Interrupted.exit_code
    except PipetrglError as error:
        logger.error("error: %s", error)
        return error.exit_code
    return 0


def _end_with(parent: int) -> None:
    """Be asked to save and end when the parent dies, however it dies (on Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be watched
            raise SystemExit(Interrupted.exit_code)


def _discard(row: Row) -> None:
    """Nobody watches a single training of many; its run folder holds everything."""


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
