"""The ray launcher: one actor a worker in a placement group; Ray places and watches, this driver supervises.

    driver (supervisor, store, metrics) ──▶ placement group: [bundle 0: actor, rank 0] [bundle 1: actor, rank 1] ..

Activations travel over the same torch.distributed links as everywhere, never through Ray's object store.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, final

import ray
import ray.util
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.channels.connect import address_towards
from pipetrgl.config.schema import Config
from pipetrgl.engine.metrics import Sink
from pipetrgl.errors import LaunchError
from pipetrgl.launchers.process import serve
from pipetrgl.launchers.ray_metrics import gauged
from pipetrgl.launchers.supervise import Budget, Supervisor, host_store
from pipetrgl.logs import log_to_file
from pipetrgl.worker import Job
from pipetrgl.world import World

T = TypeVar("T")

# Not annotated by Ray.
_node_ip: Any = ray.util.get_node_ip_address
_resources: Any = ray.cluster_resources
_free_resources: Any = ray.available_resources

_KILL_S = 10.0
_POLL_S = 0.05
_PROBE_S = 10.0
_TOKEN = "RAY_AUTH_TOKEN"
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray wants 75 MiB at least; nothing of ours is put there


def launch(job: Job, sink: Sink, budget: Budget) -> None:
    """Train in Ray actors; logs go to logs/stage-k.log in the run folder, and to Ray's own.

    Raises:
        PipetrglError: the first error of any worker that no replacement could mend, or no cluster, or no room in it.
    """
    config = job.blueprint.config
    with _cluster(config), _placed(config) as group:
        address = _node_ip()
        board = Board(host_store(address, config.launcher.port), config.channel.heartbeat_timeout_s)
        actors = _Actors(job, group, address, board.store.port)
        Supervisor(job, board, actors, gauged(sink, job.run.name), budget).run()


class WorkerActor:
    """One worker; a class of its own module, so that an actor imports it instead of unpickling code."""

    def pid(self) -> int:
        return os.getpid()

    def serve(self, run: str, rank: int, incarnation: int, host: str, port: int) -> int:
        """The worker's whole life; returns its exit code."""
        with log_to_file(Path(run) / "logs" / f"stage-{rank}.log"):
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
            # the node's GPUs are all visible (see _Actors): NCCL's peer-to-peer needs to see the neighbour's as well
            gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            return serve(Path(run), rank, incarnation, store, address_towards(host, port), int(gpus[0]) if gpus else 0)


@final
class _Actors:
    """The workers of a run, one bundle each."""

    def __init__(self, job: Job, group: PlacementGroup, host: str, port: int) -> None:
        self._job = job
        self._group = group
        self._host = host
        self._port = port
        self._actors: dict[int, Any] = {}
        self._served: dict[int, Any] = {}
        self._pids: dict[int, Any] = {}

    def start(self, rank: int, incarnation: int) -> None:
        stage = self._job.blueprint.world.place(rank).stage
        config = self._job.blueprint.config
        needs = bundle(config, stage)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        # no restart by Ray: a death is the supervisor's to answer
        actor: Any = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=needs.pop("CPU"),
                num_gpus=needs.pop("GPU", 0),
                resources=needs,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": _environ(self._job)},
            )
            .remote()
        )
        self._actors[rank] = actor
        self._pids[rank] = actor.pid.remote()
        self._served[rank] = actor.serve.remote(str(self._job.run), rank, incarnation, self._host, self._port)

    def ending(self, rank: int) -> str | None:
        if not self._is_ready(self._served[rank]):
            return None
        try:
            code = ray.get(self._served[rank])
        except RayActorError as error:
            return f"{self._name(rank)}, died: {_reason(error)}"
        except RayError as error:
            return f"{self._name(rank)}, failed: {_reason(error)}"
        return f"{self._name(rank)}, ended with exit code {code} before it could say why" if code else ""

    def kill(self, rank: int) -> None:
        ray.kill(self._actors[rank])
        ray.wait([self._served[rank]], timeout=_KILL_S)

    def end(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def _name(self, rank: int) -> str:
        try:
            return f"actor process {ray.get(self._pids[rank], timeout=0)}"
        except RayError:  # it never came so far
            return "its actor"

    def _is_ready(self, future: Any) -> bool:
        ready, _ = ray.wait([future], timeout=0)
        return bool(ready)


def stages_of_workers(config: Config) -> list[int]:
    """The stage of every rank."""
    return [place.stage for place in World(config.pipeline.replica_counts).places]


def bundle(config: Config, stage: int) -> dict[str, float]:
    """What the worker of a stage takes from its node, in Ray's names."""
    wants = config.launcher.ray
    gpus = wants.gpus if wants.gpus is not None else (1.0 if config.pipeline.device == "cuda" else 0.0)
    needs = {"CPU": _of_stage(wants.cpus, stage), "GPU": _of_stage(gpus, stage)}
    custom: dict[str, float] = _of_stage(wants.resources, stage)
    return {name: amount for name, amount in needs.items() if amount} | custom


@contextlib.contextmanager
def _placed(config: Config) -> Iterator[PlacementGroup]:
    """Room for all workers at once.

    Raises:
        LaunchError: none after `channel.start_timeout_s`; says what was wanted and what there is.
    """
    stages = stages_of_workers(config)
    bundles = [bundle(config, stage) for stage in stages]
    labels: list[dict[str, str]] = [_of_stage(config.launcher.ray.labels, stage) for stage in stages]
    selector = {"bundle_label_selector": labels} if any(labels) else {}
    group = placement_group(bundles, strategy=config.launcher.ray.strategy, **selector)
    try:
        deadline = time.monotonic() + config.channel.start_timeout_s
        while not group.wait(1):
            if time.monotonic() > deadline:
                state = placement_group_table(group)["stats"]["scheduling_state"]
                raise LaunchError(
                    f"launcher.ray: no room for {len(bundles)} workers of {bundles} ({config.launcher.ray.strategy}"
                    f"{f', labels {labels}' if any(labels) else ''}) after {config.channel.start_timeout_s:.0f} s: "
                    f"{state}; the cluster has {_resources()}, free {_free_resources()}"
                )
        yield group
    finally:
        remove_placement_group(group)


@contextlib.contextmanager
def _cluster(config: Config) -> Iterator[None]:
    """The Ray that this process is connected to already, the one at an address, or one of the run's own.

    Raises:
        LaunchError: nobody answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = config.launcher.ray.address or os.environ.get("RAY_ADDRESS") or "local"
    with _own_session(config) if address == "local" else _session_at(address) as options:
        try:
            _join(address, options)
            yield
        finally:
            ray.shutdown()  # before cli.main leaves by os._exit, which would leave Ray's agents behind


def _join(address: str, options: Mapping[str, Any]) -> None:
    try:
        with _handlers_kept():
            ray.init(log_to_driver=False, configure_logging=False, **options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(f"launcher.ray.address: cannot join Ray at '{address}': {error}") from error


@contextlib.contextmanager
def _session_at(address: str) -> Iterator[dict[str, Any]]:
    """Options of `ray.init` for a running cluster. Asked by TCP first: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
        except OSError as error:
            raise LaunchError(f"launcher.ray.address: nobody answers at '{address}': {error}") from error
    yield {"address": address}


@contextlib.contextmanager
def _own_session(config: Config) -> Iterator[dict[str, Any]]:
    """Options of `ray.init` for a small Ray on this machine that leaves nothing behind, also no token in ~/.ray."""
    totals: dict[str, float] = {}
    for stage in stages_of_workers(config):
        for name, amount in bundle(config, stage).items():
            totals[name] = totals.get(name, 0.0) + amount
    # the stages may share cores, as with the local launcher
    num_cpus = max(os.cpu_count() or 1, math.ceil(totals.pop("CPU")))
    totals.pop("GPU", None)  # Ray counts the GPUs that there are
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the path of a socket may hold 107 bytes
    makes_token = _TOKEN not in os.environ
    if makes_token:
        os.environ[_TOKEN] = _own_token()
    try:
        yield {
            "address": "local",
            "num_cpus": num_cpus,
            "resources": totals,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    finally:
        if makes_token:
            del os.environ[_TOKEN]
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _own_token() -> str:
    """One for the life of this process: Ray keeps the first that it reads, also for a second session."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """`ray.init` takes over SIGTERM, which is ours: it asks for a checkpoint."""
    mine = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, mine)


def _environ(job: Job) -> dict[str, str]:
    """Of every actor's process."""
    threads = str(job.blueprint.config.train.threads)  # Ray would set it from the number of CPUs
    environ = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    return environ | {name: job.environ[name] for name in ("PIPETRGL_DATA",) if name in job.environ}


def _of_stage(value: T | list[T], stage: int) -> T:
    return value[stage] if isinstance(value, list) else value


def _reason(error: RayError) -> str:
    """The first line of Ray's account that says something: the others name classes and ids."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if " " in line and not line.startswith("class_name")), type(error).__name__)
