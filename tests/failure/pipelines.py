"""`pipetrgl train` as a user runs it, in processes of its own, with a hand on every worker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipetrgl.config.load import dump
from tests.equivalence.runs import tiny

# long enough to be still running when a test strikes
ENDLESS: dict[str, Any] = {"pipeline": {"stages": 3}, "train": {"max_steps": 100_000, "epochs": 10_000}}


class Pipeline:
    """One command of its own in `folder`, whose run folder is the only one in `folder/runs`.

    Args:
        folder: made if need be; another pipeline in it goes on with its run.
        overrides: of the command line.
        command: what comes before `train`.
        model: of tests/equivalence/runs.py.
        sections: of the config.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        command: tuple[str, ...] = ("-m", "pipetrgl"),
        model: str = "mlp",
        **sections: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        (folder / "config.yaml").write_text(dump(tiny(model, folder / "runs", **sections)))
        with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, "train", "config.yaml", *overrides],
                cwd=folder,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return (self.folder / "stdout").read_text()

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return (self.folder / "stderr").read_text()

    @property
    def run(self) -> Path:
        (run,) = (self.folder / "runs").iterdir()
        return run

    def workers(self) -> dict[int, int]:
        """Process id of the newest worker at each rank that has said who it is and still runs."""
        pids = {}
        for log in [*self.folder.glob("runs/*/logs/stage-*.log"), self.folder / "stderr"]:  # torchrun's: on stderr
            for rank, pid in re.findall(r"stage \d+ \(rank (\d+)\) is process (\d+) on ", log.read_text()):
                pids[int(rank)] = int(pid)
        return {rank: pid for rank, pid in pids.items() if _runs(pid)}

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        """What the run has written so far, without a last line that is not whole yet."""
        rows = []
        for file in self.folder.glob("runs/*/metrics.jsonl"):
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return [row for row in rows if row["kind"] == kind]

    def wait_for_step(self, step: int, stage: int) -> None:
        """Until a stage has reported `step`; fails where the run ends before."""
        self.wait_until(
            lambda: any(row["step"] >= step for row in self.rows() if row["stage"] == stage), f"step {step}"
        )

    def wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.finish()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.05)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.workers()[rank], number)

    def finish(self) -> tuple[int, str]:
        """Exit code and stderr, after all processes have gone."""
        code = self.process.wait(timeout=180)
        assert self.workers() == {}
        return code, self.errors

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.run / "result.json").read_text())
        return result

    def clean_up(self) -> None:
        """End whatever a failing test leaves."""
        for pid in [self.process.pid, *self.workers().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
