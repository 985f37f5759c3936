"""Ray: the plain loop's result, a stage replaced alone, nodes that die, and clear words where there is no room."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.errors import ConfigError, LaunchError
from pipetrgl.launchers.start import train
from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.equivalence.test_resume import without_logs
from tests.failure.conftest import Start

FOUR: dict[str, Any] = {
    "pipeline": {"stages": 4},
    "train": {"max_steps": 600, "epochs": 60},
    "checkpoint": {"every": 20},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny("mlp", tmp_path_factory.mktemp("undisturbed"), launcher={"name": "serial"}, **FOUR))


def traces_of(driver: int) -> set[str]:
    """What is left of a driver's own Ray, whose session is named after the driver's process: folders and processes."""
    session = re.compile(rf"/session_[\d_-]+_{driver}\b")
    found = {str(path) for path in Path("/tmp").glob(f"ray-*/session_*_{driver}")}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if session.search(command):
            found.add(command)
    return found


def test_on_ray_a_killed_actor_is_replaced_alone_and_nothing_is_left_behind(start: Start, undisturbed: Path) -> None:
    pipeline = start("launcher=ray", "launcher.max_failures=1", **FOUR)
    pipeline.wait_for_step(100, stage=2)
    pids = pipeline.workers()
    assert len(traces_of(pipeline.process.pid)) > 2  # so that the search below would find something
    pipeline.kill(2)
    pipeline.wait_until(lambda: pipeline.workers().get(2, pids[2]) != pids[2], "another stage 2")
    after = pipeline.workers()
    assert pipeline.finish()[0] == 0
    assert {rank: pid for rank, pid in after.items() if rank != 2} == {r: pid for r, pid in pids.items() if r != 2}
    (recovery,) = pipeline.result()["recoveries"]
    assert recovery["stage"] == 2
    assert f"stage 2 (rank 2), actor process {pids[2]}, died" in recovery["error"]
    assert_equal_runs(without_logs(pipeline.run), undisturbed)
    assert traces_of(pipeline.process.pid) == set()


def test_on_ray_actors_may_be_replicas(start: Start, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "pipeline": {"stages": 2, "replicas": [1, 2]}, "train": {"max_steps": 20, "drop_last": True},
        "evaluate": {"batch": 8},
    }  # fmt: skip
    pipeline = start("launcher=ray", **sections)
    assert pipeline.finish()[0] == 0
    threads = run(tiny("mlp", tmp_path / "threads", launcher={"name": "threads"}, **sections))
    assert_equal_runs(pipeline.run, threads)


def test_on_ray_two_neighbours_that_die_together_start_the_whole_run_again(start: Start, undisturbed: Path) -> None:
    pipeline = start("launcher=ray", "launcher.max_failures=3", **FOUR)
    pipeline.wait_for_step(60, stage=3)
    pids = pipeline.workers()
    for stage in (1, 2):
        pipeline.kill(stage)
    assert pipeline.finish()[0] == 0
    assert not set(pids.values()) & {stage["pid"] for stage in pipeline.result()["stages"]}
    assert "starting all workers again from step" in pipeline.rows("log")[-1]["message"]
    assert_equal_runs(without_logs(pipeline.run), undisturbed)
    assert traces_of(pipeline.process.pid) == set()


def test_sigterm_to_the_driver_saves_and_the_run_goes_on_elsewhere(start: Start, undisturbed: Path) -> None:
    pipeline = start("launcher=ray", **FOUR)
    pipeline.wait_for_step(50, stage=3)
    pipeline.process.send_signal(signal.SIGTERM)
    code, errors = pipeline.finish()
    assert code == 130
    assert "error: stopped after step" in errors
    resumed = start("checkpoint.resume=auto", "launcher=threads", **FOUR)
    assert resumed.finish() == (0, "")
    assert_equal_runs(resumed.run, undisturbed)


def test_without_the_extra_one_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "pipetrgl.launchers.ray_actors", raising=False)
    with pytest.raises(ConfigError, match=r"launcher.name: 'ray' needs the extra: pip install 'pipetrgl\[ray\]'"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"name": "ray"}))


def test_a_cluster_that_does_not_answer_is_one_message(tmp_path: Path) -> None:
    launcher = {"name": "ray", "ray": {"address": "127.0.0.1:1"}}
    with pytest.raises(LaunchError, match="launcher.ray.address: nobody answers at '127.0.0.1:1': .*refused"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher=launcher))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and four nodes with one each: as many raylets, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_TOKEN"] = "of-a-test-cluster-on-this-machine-only"
    head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(**NODE) for _ in range(4)]
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    signal.signal(signal.SIGTERM, handler)
    folder = cluster.head_node.get_session_dir_path()  # below /tmp/ray: Cluster knows no other place
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    del os.environ["RAY_AUTH_TOKEN"]


NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "labels": {"disk": "fast"}}


def test_a_node_that_dies_takes_one_stage_with_it_which_is_placed_elsewhere(
    tmp_path: Path, cluster: Any, undisturbed: Path
) -> None:
    ray_cluster, nodes = cluster
    wants = {"strategy": "STRICT_SPREAD", "cpus": 0.5, "labels": {"disk": "fast"}}
    # the first replacement may go to the dead node, of which Ray learns only after some seconds
    launcher = {"name": "ray", "max_failures": 3, "ray": wants}

    def strike(row: dict[str, Any]) -> None:
        if nodes and row["kind"] == "train" and row["step"] >= 60:
            ray_cluster.remove_node(nodes[1], allow_graceful=False)
            ray_cluster.add_node(**NODE)
            nodes.clear()

    result = train(tiny("mlp", tmp_path, launcher=launcher, **FOUR), lambda blueprint, folder: strike)
    assert nodes == []
    assert result is not None
    assert len(result["recoveries"]) == 1
    assert_equal_runs(without_logs(Path(result["run"])), undisturbed)


def test_where_there_is_no_room_the_message_says_what_was_wanted_and_what_there_is(
    tmp_path: Path, cluster: Any
) -> None:
    launcher = {"name": "ray", "ray": {"cpus": [1.0, 2.0], "strategy": "SPREAD"}}
    with pytest.raises(
        LaunchError,
        match=r"no room for 2 workers of \[\{'CPU': 1.0\}, \{'CPU': 2.0\}\] \(SPREAD\) after 1 s: INFEASIBLE; "
        r"the cluster has \{.*'CPU': 4.0",
    ):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher=launcher, channel={"start_timeout_s": 1.0}))
