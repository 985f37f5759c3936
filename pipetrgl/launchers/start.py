"""From a config to a finished run folder, by whichever launcher the config names."""

from __future__ import annotations

import dataclasses
import datetime
import glob
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.load import config_hash, dump, load
from pipetrgl.config.schema import Config
from pipetrgl.data import catalogue
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint, newest_complete, write_atomically
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.errors import ConfigError, Interrupted, LaunchError, LinkError, PipetrglError, StoppedError
from pipetrgl.launchers import local, serial, threads, torchrun
from pipetrgl.launchers.supervise import Budget
from pipetrgl.recorder import Recorder
from pipetrgl.worker import Job

logger = logging.getLogger(__name__)

Display = Callable[[Row], None]
_ORIGIN = "resumed-from.json"
_IN_THIS_PROCESS: dict[str, Callable[[Job, Sink, Budget], None]] = {
    "serial": serial.launch,
    "threads": threads.launch,
    "local": local.launch,
}


def describe(config: Config) -> DataSpec:
    """Sizes and shapes of the data set; reads it.

    Raises:
        DataError: it is missing or damaged.
    """
    return catalogue.load(config.data, config.seed, dict(os.environ)).spec


def train(
    config: Config, open_display: Callable[[Blueprint, Path], Display], stop: threading.Event | None = None
) -> Row | None:
    """Run a training from beginning to end.

    Args:
        config: validated.
        open_display: given blueprint and run folder, returns what sees every row; called in the leading process only.
        stop: once set, the run ends at the next optimizer step with a checkpoint.
    Returns:
        The result, as in result.json, or None on a rank that does not lead.
    Raises:
        PipetrglError: the run's first error; the run folder has been brought in order.
    """
    _require_device(config)
    stop = stop or threading.Event()
    if torchrun.is_torchrun() and config.launcher.name in ("local", "torchrun"):
        return _train_rank(config, open_display, stop)
    if config.launcher.name == "torchrun":
        torchrun.join(config.channel.start_timeout_s)  # explains how to start it
    blueprint = draw_up(config, describe(config))
    run, checkpoint = choose_start(config, config.checkpoint.resume)
    job = _job(blueprint, run, checkpoint, stop)
    recorder = Recorder(run, blueprint, open_display(blueprint, run))
    recorder.rewind(job.first_step)
    return _lead(recorder, config.launcher.name, lambda: _launch_again(job, recorder))


def _train_rank(
    config: Config, open_display: Callable[[Blueprint, Path], Display], stop: threading.Event
) -> Row | None:
    timeout_s = config.channel.start_timeout_s
    me = torchrun.join(timeout_s)
    spec = torchrun.shared_spec(me, lambda: describe(config), timeout_s)
    blueprint = draw_up(config, spec)
    blueprint.world.require_size(me.world_size)
    resume = "auto" if me.attempt > 1 else config.checkpoint.resume
    run, checkpoint = torchrun.shared_start(me, lambda: choose_start(config, resume), timeout_s)
    job = _job(blueprint, run, checkpoint, stop)
    if not me.leads:
        torchrun.launch(job, me, _discard)
        return None
    recorder = Recorder(run, blueprint, open_display(blueprint, run))
    recorder.rewind(job.first_step)
    try:
        return _lead(recorder, "torchrun", lambda: torchrun.launch(job, me, recorder))
    except StoppedError as error:
        # exit code 0, as on the other ranks: any other would make the agent start the world again
        logger.warning("%s", error)
        return None


def _job(blueprint: Blueprint, run: Path, checkpoint: Checkpoint | None, stop: threading.Event) -> Job:
    if checkpoint is not None:
        checkpoint.require_fit(run, blueprint.itinerary.total_steps)
    return Job(blueprint, run, dict(os.environ), checkpoint, stop)


def _launch_again(job: Job, recorder: Recorder) -> None:
    """Launch; after a worker died, up to `launcher.max_failures` times again from the newest complete checkpoint."""
    config = job.blueprint.config
    budget = Budget(config.launcher.max_failures)
    while True:
        try:
            _IN_THIS_PROCESS[config.launcher.name](job, recorder, budget)
            return
        except (LaunchError, LinkError) as error:
            if not budget.spend():
                raise
            job = dataclasses.replace(job, checkpoint=newest_complete(job.run) or _origin(job.run))
            recorder.rewind(job.first_step)
            message = f"{error}; starting all workers again from step {job.first_step}"
            recorder({"kind": "log", "stage": 0, "level": "WARNING", "message": message})


def _lead(recorder: Recorder, launcher: str, launch: Callable[[], None]) -> Row:
    """Launch, and leave a result whatever happens.

    Raises:
        StoppedError: the run was asked to end before its time, and did so well.
    """
    try:
        launch()
        recorder.require_complete()
    except (KeyboardInterrupt, Interrupted) as error:
        if not isinstance(error, Interrupted):
            error = Interrupted("interrupted")
        recorder.finish("interrupted", launcher, environment(), str(error))
        raise error from None
    except PipetrglError as error:
        recorder.finish("failed", launcher, environment(), str(error))
        raise
    except BaseException as error:
        recorder.finish("failed", launcher, environment(), f"{type(error).__name__}: {error}")
        raise
    return recorder.finish("done", launcher, environment())


def choose_start(config: Config, resume: str) -> tuple[Path, Checkpoint | None]:
    """The run folder, and the checkpoint in it or in another run that training goes on from.

    Args:
        config: of the run.
        resume: "never", "auto" (the newest unfinished run of this name and config goes on in its own folder), or a run
            folder, whose newest complete checkpoint starts a new run.
    Raises:
        ConfigError: the folder named by `resume` has no complete checkpoint.
    """
    if resume == "auto":
        for run in sorted(Path(config.run.folder).absolute().glob(f"{glob.escape(config.run.name)}-*"), reverse=True):
            if _goes_on(run, config):
                # options outside the hash, such as deadlines or checkpoint.every, are those of today
                write_atomically(run / "config.yaml", dump(config).encode())
                return run, newest_complete(run) or _origin(run)
    elif resume != "never":
        checkpoint = newest_complete(Path(resume).expanduser().absolute())
        if checkpoint is None:
            raise ConfigError(f"checkpoint.resume: '{resume}' holds no complete checkpoint")
        run = make_run_folder(config)
        write_atomically(run / _ORIGIN, json.dumps(checkpoint.to_dict(), indent=2).encode())
        return run, checkpoint
    return make_run_folder(config), None


def _origin(run: Path) -> Checkpoint | None:
    """The checkpoint of another run that this one started from, as long as it has none of its own."""
    path = run / _ORIGIN
    return Checkpoint.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _goes_on(run: Path, config: Config) -> bool:
    """Whether `run` is an unfinished run of the same name and config."""
    if not re.fullmatch(_folder_name(re.escape(config.run.name), r"\d{8}T\d{6}", config) + r"(-\d+)?", run.name):
        return False
    try:
        if config_hash(load(run / "config.yaml")) != config_hash(config):
            return False
        return bool(json.loads((run / "result.json").read_text(encoding="utf-8"))["status"] != "done")
    except ConfigError:
        return False
    except (OSError, ValueError, KeyError):
        return True  # killed before it could write a result


def _folder_name(name: str, time: str, config: Config) -> str:
    return f"{name}-{time}-{config_hash(config)[:4]}"


def make_run_folder(config: Config) -> Path:
    """`runs/<name>-<UTC>-<hash4>` with the resolved config and the environment; never an existing folder.

    Raises:
        ConfigError: it cannot be written.
    """
    time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    name, text = _folder_name(config.run.name, time, config), dump(config)
    try:
        for attempt in range(1000):
            run = Path(config.run.folder).absolute() / (name if attempt == 0 else f"{name}-{attempt}")
            try:
                run.mkdir(parents=True)
                break
            except FileExistsError:
                if run.parent.is_dir():
                    continue
                raise
        write_atomically(run / "config.yaml", text.encode())
        write_atomically(run / "env.json", json.dumps(environment(), indent=2).encode())
    except OSError as error:
        raise ConfigError(f"run.folder: cannot write to '{config.run.folder}': {error.strerror}") from error
    return run


def environment() -> dict[str, Any]:
    """Versions and machine, for result.json and env.json."""
    return {
        "pipetrgl": importlib.metadata.version("pipetrgl"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "git_sha": _git_sha(),
        "command": sys.argv,
    }


def _git_sha() -> str | None:
    """Of the source tree that this package runs from; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _require_device(config: Config) -> None:
    if config.pipeline.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise LaunchError("pipeline.device: 'cuda', but torch finds no CUDA device here; use pipeline.device=cpu")
    num_devices = torch.cuda.device_count()
    if config.launcher.name == "local" and not torchrun.is_torchrun() and num_devices < config.pipeline.stages:
        raise LaunchError(
            f"pipeline.device: {config.pipeline.stages} local stages need as many GPUs, and this machine has "
            f"{num_devices}; NCCL does not connect two stages on one GPU"
        )


def _discard(row: Row) -> None:
    """A rank that does not lead keeps no books: its rows go through the store."""
