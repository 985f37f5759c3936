"""The run folder: made, found again by a run that goes on, and claimed by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipetrgl.config.bench import Bench
from pipetrgl.config.load import config_hash, dump, load
from pipetrgl.config.schema import Config
from pipetrgl.engine.checkpoint import MANIFEST, Checkpoint, newest_complete, write_atomically
from pipetrgl.errors import ConfigError, LaunchError
from pipetrgl.launchers.environment import environment

_ORIGIN = "resumed-from.json"


def choose_start(config: Config, resume: str) -> tuple[Path, Checkpoint | None]:
    """The run folder, and the checkpoint in it or in another run that training goes on from.

    Args:
        config: of the run.
        resume: "never", "auto" (the newest unfinished run of this name and config goes on in its own folder), or a run
            folder, whose newest complete checkpoint starts a new run, or the folder of one checkpoint.
    Raises:
        ConfigError: the folder named by `resume` has no complete checkpoint.
    """
    if resume == "auto":
        for run in sorted(Path(config.run.folder).absolute().glob(f"{glob.escape(config.run.name)}-*"), reverse=True):
            if _goes_on(run, config):
                # options outside the hash, such as deadlines or checkpoint.every, are those of today
                write_atomically(run / "config.yaml", dump(config).encode())
                return run, newest_complete(run) or origin_of(run)
    elif resume != "never":
        path = Path(resume).expanduser().absolute()
        checkpoint = Checkpoint.read(path) if (path / MANIFEST).exists() else newest_complete(path)
        if checkpoint is None:
            raise ConfigError(f"checkpoint.resume: '{resume}' holds no complete checkpoint")
        run = make_run_folder(config)
        write_atomically(run / _ORIGIN, json.dumps(checkpoint.to_dict(), indent=2).encode())
        return run, checkpoint
    return make_run_folder(config), None


def origin_of(run: Path) -> Checkpoint | None:
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
        return _new_folder(Path(config.run.folder), name, "config.yaml", text)
    except OSError as error:
        raise ConfigError(f"run.folder: cannot write to '{config.run.folder}': {error.strerror}") from error


def make_bench_folder(bench: Bench) -> Path:
    """`runs/<name>-<UTC>-<hash4>` with the resolved bench and the environment; never an existing folder.

    Raises:
        ConfigError: it cannot be written.
    """
    time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    try:
        return _new_folder(Path(bench.folder), f"{bench.name}-{time}-{bench.hash[:4]}", "bench.yaml", bench.text)
    except OSError as error:
        raise ConfigError(f"folder: cannot write to '{bench.folder}': {error.strerror}") from error


def _new_folder(parent: Path, name: str, file: str, text: str) -> Path:
    for attempt in range(1000):
        run = parent.absolute() / (name if attempt == 0 else f"{name}-{attempt}")
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError:
            if run.parent.is_dir():
                continue
            raise
    write_atomically(run / file, text.encode())
    write_atomically(run / "env.json", json.dumps(environment(), indent=2).encode())
    return run


@contextlib.contextmanager
def claimed(run: Path, otherwise: str = "or start a run of its own with checkpoint.resume=never") -> Iterator[None]:
    """Hold the folder of a run or a study; the kernel lets go of it however this process ends.

    Args:
        otherwise: what a user may do who will not wait.
    Raises:
        LaunchError: another process leads a run in it.
    """
    with (run / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise LaunchError(
                f"{run} is in use by process {lock.read().strip()}; wait for its end, {otherwise}"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
