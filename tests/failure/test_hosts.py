"""Two hosts under torchrun: the same result over any network, and an end, with a name, when the network is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.config.load import dump
from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.hosts import Host, hosts

IMPATIENT = {"heartbeat_s": 0.5, "heartbeat_timeout_s": 4.0}
LONG = {"max_steps": 800, "epochs": 10_000}
ENDLESS = {"max_steps": 100_000, "epochs": 10_000}  # still running when the test strikes
HANGS_S = 120.0  # nothing here takes a quarter of this


@pytest.fixture
def two() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


class Torchrun:
    """`pipetrgl train` on two hosts, `workers` a host; the run folder is on a disk that both see."""

    def __init__(
        self, folder: Path, two: list[Host], workers: int, rendezvous: str, *options: str, **sections: Any
    ) -> None:
        self.folder = folder
        self.stages = 2 * workers
        self.hosts = two
        config = tiny("mlp", folder / "runs", pipeline={"stages": self.stages}, **sections)
        (folder / "config.yaml").write_text(dump(config))
        options = ("--nnodes", "2", "--nproc-per-node", str(workers), *options)
        self.agents = [self._start(number, rendezvous, options) for number in range(2)]

    def _start(self, number: int, rendezvous: str, options: tuple[str, ...]) -> subprocess.Popen[str]:
        head, here = self.hosts[0].address, self.hosts[number]
        where = {
            "static": ["--master-addr", head, "--master-port", "29400", "--node-rank", str(number)],
            # the hosts share a host name, by which torchrun would tell whether it is the one with the store
            "c10d": [
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head}:29400", "--rdzv-id", "test"),
                *("--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", here.address),
            ],
        }[rendezvous]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *options, *where]
        with (self.folder / f"host{number}.log").open("w") as log:
            return here.start(
                [*torchrun, "-m", "pipetrgl", "train", str(self.folder / "config.yaml")],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def log(self, number: int) -> str:
        """What the user of a host sees."""
        return (self.folder / f"host{number}.log").read_text()

    def workers(self, number: int) -> list[int]:
        """Process ids of the workers on a host, torchrun's agent left out."""
        return [pid for pid in self.hosts[number].processes() if pid != self.agents[number].pid]

    def wait_until_training(self) -> None:
        def trains() -> bool:
            files = list(self.folder.glob("runs/*/metrics.jsonl"))
            return bool(files) and f'"stage": {self.stages - 1}' in files[0].read_text()

        deadline = time.monotonic() + HANGS_S
        while not trains():
            assert all(agent.poll() is None for agent in self.agents), self.log(0) + self.log(1)
            assert time.monotonic() < deadline, self.log(0) + self.log(1)
            time.sleep(0.1)

    def finish(self) -> list[int]:
        """Exit codes of the agents, after every process on both hosts has gone."""
        codes = [agent.wait(HANGS_S) for agent in self.agents]
        assert [host.processes() for host in self.hosts] == [[], []]
        return codes

    @property
    def run(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder


def serial(torchrun: Torchrun, **sections: Any) -> Path:
    """The same run by the plain loop."""
    pipeline, launcher = {"stages": torchrun.stages}, {"name": "serial"}
    return run(tiny("mlp", torchrun.folder / "serial", pipeline=pipeline, launcher=launcher, **sections))


@pytest.mark.parametrize(
    ("workers", "rendezvous", "rate"), [(1, "static", None), (2, "c10d", None), (1, "c10d", "1mbit")]
)
def test_two_hosts_equal_serial(
    two: list[Host], tmp_path: Path, workers: int, rendezvous: str, rate: str | None
) -> None:
    """Over a slow cable as well."""
    if rate is not None:
        two[1].slow(rate)
    torchrun = Torchrun(tmp_path, two, workers, rendezvous)
    assert torchrun.finish() == [0, 0], torchrun.log(0) + torchrun.log(1)
    assert_equal_runs(torchrun.run, serial(torchrun))


@pytest.mark.parametrize("cut_off", [0, 1])
def test_a_cut_link_ends_the_workers_of_both_hosts_and_each_names_the_other(
    two: list[Host], tmp_path: Path, cut_off: int
) -> None:
    torchrun = Torchrun(tmp_path, two, 1, "static", channel=IMPATIENT, train=ENDLESS)
    torchrun.wait_until_training()
    two[cut_off].link_down()
    assert torchrun.finish() == [1, 1]  # torchrun's own exit code
    assert "error: stage 1 (rank 1) has given no sign of life for 4 s" in torchrun.log(0)
    assert "error: the run's store at 10.77.0.1:29400 has given no answer for 4 s" in torchrun.log(1)
    assert "without it nothing is heard of stage 0 (rank 0)" in torchrun.log(1)


def test_a_short_cut_is_survived(two: list[Host], tmp_path: Path) -> None:
    torchrun = Torchrun(tmp_path, two, 1, "static", channel=IMPATIENT, train=LONG)
    torchrun.wait_until_training()
    two[1].link_down()
    time.sleep(1.0)
    two[1].link_up()
    assert torchrun.workers(1) != []
    assert torchrun.finish() == [0, 0], torchrun.log(0) + torchrun.log(1)
    assert_equal_runs(torchrun.run, serial(torchrun, train=LONG))


def test_all_workers_start_again_when_one_on_the_other_host_is_killed(two: list[Host], tmp_path: Path) -> None:
    options = {"train": LONG, "checkpoint": {"every": 20}}
    torchrun = Torchrun(tmp_path, two, 1, "c10d", "--max-restarts", "1", **options)
    torchrun.wait_until_training()
    (worker,) = torchrun.workers(1)
    os.kill(worker, signal.SIGKILL)
    assert torchrun.finish() == [0, 0], torchrun.log(0) + torchrun.log(1)
    assert_equal_runs(torchrun.run, serial(torchrun, **options))


def test_a_stopped_worker_on_the_other_host_is_named(two: list[Host], tmp_path: Path) -> None:
    torchrun = Torchrun(tmp_path, two, 1, "c10d", channel=IMPATIENT, train=ENDLESS)
    torchrun.wait_until_training()
    (worker,) = torchrun.workers(1)
    os.kill(worker, signal.SIGSTOP)
    # torchrun's agent learns of it by the loss of the other agent, and kills a worker that ignores SIGTERM after 30 s
    assert torchrun.finish() == [1, 1]
    assert "error: stage 1 (rank 1) has given no sign of life for 4 s" in torchrun.log(0)
