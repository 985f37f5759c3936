"""launch/ray_job.sh against a real Ray head with its job server, all on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetrgl.config.load import dump
from tests.equivalence.runs import assert_equal_runs, run, tiny

SCRIPT = Path(__file__).parents[2] / "launch" / "ray_job.sh"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    """Of a shell in which `ray job submit` reaches a head with four CPUs; the head ends with the tests."""
    folder, port, server = Path(tempfile.mkdtemp(prefix="ray_head-", dir="/tmp")), free_port(), free_port()
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{server}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-a-test-head-on-this-machine-only",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--dashboard-port={server}"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--object-store-memory={80 * 2**20}", f"--ray-client-server-port={free_port()}"]
    # Ray's own default is one fixed port: held by another Ray on this machine, jobs are refused with 500 for ever
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        await_job_agent(environ, head, folder / "head.log")
        yield environ
    finally:
        head.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def await_job_agent(environ: dict[str, str], head: subprocess.Popen[bytes], log: Path) -> None:
    """Submit a job until one is taken: the server answers some seconds before the agent of its node takes jobs."""
    request = urllib.request.Request(
        f"{environ['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        data=json.dumps({"entrypoint": "true"}).encode(),
        headers={"Authorization": f"Bearer {environ['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(request, timeout=30).close()
            return
        except OSError as error:
            answer = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
            assert head.poll() is None and time.monotonic() < deadline, f"{answer}\n{log.read_text()}"
            time.sleep(0.5)


def submit(environ: dict[str, str], folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of the script, called from an empty directory."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    ended = subprocess.run(
        [str(SCRIPT), "config.yaml", *overrides],
        env={**environ, "WORKING_DIR": str(folder / "job"), "RUN_FOLDER": str(folder / "runs")},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_job_trains_and_ends_with_our_exit_code(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    config = tiny("mlp", tmp_path / "ignored", pipeline={"stages": 2})
    (tmp_path / "job" / "config.yaml").write_text(dump(config))
    code, output = submit(environ, tmp_path)
    assert code == 0, output
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["launcher"]) == ("done", "ray")
    assert_equal_runs(
        folder, run(tiny("mlp", tmp_path / "serial", pipeline={"stages": 2}, launcher={"name": "serial"}))
    )
    code, output = submit(environ, tmp_path, "train.epochs=0")
    assert code == 2, output
    assert "train.epochs: 0 is out of range" in output
