"""From a config to a finished run folder, by whichever launcher the config names."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.schema import Config
from pipetrgl.data import catalogue
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import Checkpoint, newest_complete
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.errors import ConfigError, Interrupted, LaunchError, LinkError, PipetrglError, StoppedError
from pipetrgl.launchers import local, serial, threads, torchrun
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.folder import choose_start, claimed, origin_of
from pipetrgl.launchers.supervise import Budget
from pipetrgl.recorder import Recorder
from pipetrgl.worker import Job

logger = logging.getLogger(__name__)

Display = Callable[[Row], None]


def _launch_on_ray(job: Job, sink: Sink, budget: Budget) -> None:
    try:
        from pipetrgl.launchers import ray_actors  # an extra: not installed everywhere
    except ModuleNotFoundError as error:
        raise ConfigError("launcher.name: 'ray' needs the extra: pip install 'pipetrgl[ray]'") from error
    ray_actors.launch(job, sink, budget)


_LAUNCHERS: dict[str, Callable[[Job, Sink, Budget], None]] = {
    "serial": serial.launch,
    "threads": threads.launch,
    "local": local.launch,
    "ray": _launch_on_ray,
}


def _as_it_is(config: Config) -> Config:
    return config


def describe(config: Config) -> DataSpec:
    """Sizes and shapes of the data set; reads it.

    Raises:
        DataError: it is missing or damaged.
    """
    return catalogue.load(config.data, config.seed, dict(os.environ)).spec


def train(
    config: Config,
    open_display: Callable[[Blueprint, Path], Display],
    stop: threading.Event | None = None,
    planned: Callable[[Config], Config] = _as_it_is,
) -> Row | None:
    """Run a training from beginning to end.

    Args:
        config: validated.
        open_display: given blueprint and run folder, returns what sees every row; called in the leading process only.
        stop: once set, the run ends at the next optimizer step with a checkpoint.
        planned: replaces `model.cuts: auto` by cuts, on the leading process.
    Returns:
        The result, as in result.json, or None on a rank that does not lead.
    Raises:
        PipetrglError: the run's first error; the run folder has been brought in order.
    """
    _require_device(config)
    stop = stop or threading.Event()
    if torchrun.is_torchrun() and config.launcher.name in ("local", "torchrun"):
        return _train_rank(config, open_display, stop, planned)
    if config.launcher.name == "torchrun":
        torchrun.join(config.channel.start_timeout_s)  # explains how to start it
    config = planned(config)
    blueprint = draw_up(config, describe(config))
    run, checkpoint = choose_start(config, config.checkpoint.resume)
    job = _job(blueprint, run, checkpoint, stop)
    with claimed(run):
        recorder = Recorder(run, blueprint, open_display(blueprint, run))
        recorder.rewind(job.first_step)
        return _lead(recorder, config.launcher.name, lambda: _launch_again(job, recorder))


def _train_rank(
    config: Config,
    open_display: Callable[[Blueprint, Path], Display],
    stop: threading.Event,
    planned: Callable[[Config], Config],
) -> Row | None:
    timeout_s = config.channel.start_timeout_s
    me = torchrun.join(timeout_s)
    if config.model.cuts == "auto":
        config = torchrun.shared_config(me, lambda: planned(config), timeout_s)
    blueprint = torchrun.shared_blueprint(me, config, lambda: draw_up(config, describe(config)), timeout_s)
    blueprint.world.require_size(me.world_size)
    resume = "auto" if me.attempt > 1 else config.checkpoint.resume
    run, checkpoint = torchrun.shared_start(me, lambda: choose_start(config, resume), timeout_s)
    job = _job(blueprint, run, checkpoint, stop)
    if not me.leads:
        torchrun.launch(job, me, _discard)
        return None
    try:
        with claimed(run):
            recorder = Recorder(run, blueprint, open_display(blueprint, run))
            recorder.rewind(job.first_step)
            return _lead(recorder, "torchrun", lambda: torchrun.launch(job, me, recorder))
    except StoppedError as error:
        # exit code 0, as on the other ranks: any other would make the agent start the world again
        logger.warning("%s", error)
        return None


def _job(blueprint: Blueprint, run: Path, checkpoint: Checkpoint | None, stop: threading.Event) -> Job:
    if checkpoint is not None:
        checkpoint.require_fit(run, blueprint.itinerary.total_steps, blueprint.updates(checkpoint.step))
    return Job(blueprint, run, dict(os.environ), checkpoint, stop)


def _launch_again(job: Job, recorder: Recorder) -> None:
    """Launch; after a worker died, up to `launcher.max_failures` times again from the newest complete checkpoint."""
    config = job.blueprint.config
    budget = Budget(config.launcher.max_failures)
    while True:
        try:
            _LAUNCHERS[config.launcher.name](job, recorder, budget)
            return
        except (LaunchError, LinkError) as error:
            if not budget.spend():
                raise
            job = dataclasses.replace(job, checkpoint=newest_complete(job.run) or origin_of(job.run))
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


def _require_device(config: Config) -> None:
    if config.pipeline.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise LaunchError("pipeline.device: 'cuda', but torch finds no CUDA device here; use pipeline.device=cpu")
    num_devices, num_workers = torch.cuda.device_count(), sum(config.pipeline.replica_counts)
    if config.launcher.name == "local" and not torchrun.is_torchrun() and num_devices < num_workers:
        raise LaunchError(
            f"pipeline.device: {num_workers} local workers need as many GPUs, and this machine has "
            f"{num_devices}; NCCL does not connect two workers on one GPU"
        )


def _discard(row: Row) -> None:
    """A rank that does not lead keeps no books: its rows go through the store."""
