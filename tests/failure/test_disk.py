"""Real file systems that are full or read-only: training goes on, the user is told, the last good checkpoint stays."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetrgl.engine.checkpoint import newest_complete
from tests.equivalence.runs import run, tiny
from tests.failure.conftest import Start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "pipetrgl-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--recursive", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_training_goes_on_and_the_last_good_checkpoint_stays_good(start: Start, small_disk: Path, trouble: str) -> None:
    pipeline = start(
        f"run.folder={small_disk}",
        pipeline={"stages": 2},
        train={"max_steps": 400, "epochs": 40},
        checkpoint={"every": 20},
        run={"save_final": False},
    )
    pipeline.wait_until(lambda: any(small_disk.glob("*/checkpoints/step-*/manifest.json")), "a checkpoint")
    (folder,) = small_disk.iterdir()
    if trouble == "full":
        fill(small_disk)
    else:
        read_only(folder / "checkpoints")
    code, errors = pipeline.finish()
    assert code == 0, errors
    assert "400 steps in" in pipeline.output
    assert "the checkpoint could not be written" in pipeline.output
    newest = newest_complete(folder)
    assert newest is not None
    assert 20 <= newest.step < 400


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(descriptor, 0, shutil.disk_usage(disk).free - 8192)
    os.close(descriptor)


def read_only(folder: Path) -> None:
    """A mount of the folder onto itself: the file system as a whole is being written to and could not change."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def test_a_run_folder_that_cannot_be_made_is_one_message(start: Start, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, errors = start(f"run.folder={small_disk}/runs").finish()
    assert code == 2
    assert errors == f"error: run.folder: cannot write to '{small_disk}/runs': Read-only file system\n"


def test_a_run_that_is_still_going_is_not_gone_on_with_by_another(start: Start) -> None:
    sections = {"pipeline": {"stages": 2}, "train": {"max_steps": 100_000, "epochs": 10_000}}
    first = start("launcher.name=threads", **sections)
    first.wait_for_step(5, stage=1)
    code, errors = start("launcher.name=threads", "checkpoint.resume=auto", **sections).finish()
    assert code == 3
    assert f"is in use by process {first.process.pid}; wait for its end" in errors


def test_one_checkpoint_can_be_named_by_its_own_folder(tmp_path: Path) -> None:
    options = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}}
    saved = run(tiny("mlp", tmp_path / "a", checkpoint={"every": 10, "keep": 9}, **options))
    resume = {"resume": str(saved / "checkpoints" / "step-20")}
    again = run(tiny("mlp", tmp_path / "b", checkpoint=resume, **options))
    assert '"step": 20' in (again / "resumed-from.json").read_text()
