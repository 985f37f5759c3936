"""SIGTERM and SIGUSR1 end a run at a whole step, with a checkpoint; going on equals never having stopped."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.errors import Interrupted
from pipetrgl.launchers.signals import stop_on_signals
from tests.equivalence.runs import assert_equal_runs, run, tiny
from tests.failure.conftest import Start

THREE: dict[str, Any] = {"pipeline": {"stages": 3}, "train": {"max_steps": 700, "epochs": 70, "accumulate": 2}}
ANNOUNCED = "saving a checkpoint and ending; a second signal ends the run at once\n"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "pipetrgl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny("mlp", tmp_path_factory.mktemp("undisturbed"), launcher={"name": "serial"}, **THREE))


@pytest.mark.parametrize(("launcher", "number"), [("local", signal.SIGTERM), ("serial", signal.SIGUSR1)])
def test_a_signal_saves_and_ends_the_run_which_can_go_on(
    start: Start, undisturbed: Path, launcher: str, number: signal.Signals
) -> None:
    pipeline = start(f"launcher.name={launcher}", **THREE)
    pipeline.wait_for_step(50, stage=2)
    pipeline.process.send_signal(number)
    code, errors = pipeline.finish()
    assert code == 130
    announced, error, *rest = errors.splitlines(keepends=True)
    assert announced == f"{number.name}: {ANNOUNCED}"
    assert error.startswith("error: stopped after step ")
    assert error.endswith(" of 700; go on with checkpoint.resume=auto\n")
    assert rest == []
    assert pipeline.result()["status"] == "interrupted"
    # one complete checkpoint, at the step where all stages ended
    (folder,) = (pipeline.run / "checkpoints").iterdir()
    assert (folder / "manifest.json").exists()
    assert folder.name == f"step-{pipeline.result()['num_steps']}"
    resumed = start("checkpoint.resume=auto", "launcher.name=local", **THREE)
    assert resumed.finish() == (0, "")
    assert_equal_runs(resumed.run, undisturbed)


def test_a_signal_to_one_rank_of_torchrun_ends_them_all_well(start: Start, undisturbed: Path) -> None:
    import subprocess

    pipeline = start(command=TORCHRUN, **THREE)
    pipeline.wait_for_step(50, stage=2)
    children = subprocess.run(
        ["pgrep", "-P", str(pipeline.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    subprocess.run(["kill", "-USR1", children[1]], check=True)
    code, errors = pipeline.finish()
    assert code == 0, errors  # anything else would make torchrun start the ranks again
    assert "stopped after step" in errors
    assert pipeline.result()["status"] == "interrupted"
    resumed = start("checkpoint.resume=auto", "launcher.name=serial", **THREE)
    assert resumed.finish() == (0, "")
    assert_equal_runs(resumed.run, undisturbed)


def test_a_second_signal_ends_the_run_at_once(start: Start) -> None:
    pipeline = start("train.max_steps=null", "train.epochs=100000", **THREE)
    pipeline.wait_for_step(20, stage=2)
    pipeline.kill(0, signal.SIGSTOP)  # so that it cannot end well
    pipeline.process.send_signal(signal.SIGTERM)
    pipeline.wait_until(lambda: pipeline.errors == f"SIGTERM: {ANNOUNCED}", "the first signal was seen")
    while pipeline.process.poll() is None:  # those within a second count as the first
        pipeline.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code, errors = pipeline.finish()
    assert code == 130
    assert errors == f"SIGTERM: {ANNOUNCED}error: ended by SIGTERM\n"


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_comes_within_a_second_is_the_same_request(
    restored_handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dying parent sends its death signal once for each thread; a scheduler and its agent each send theirs."""
    now, stop, said = [100.0], threading.Event(), list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop_on_signals(stop, said.append)
    signal.raise_signal(signal.SIGTERM)
    now[0] = 100.9
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR1)
    assert stop.is_set()
    assert len(said) == 1
    now[0] = 101.0
    with pytest.raises(Interrupted, match="ended by SIGUSR1"):
        signal.raise_signal(signal.SIGUSR1)


def test_the_first_signal_to_a_process_is_a_request_also_when_another_was_asked_before(restored_handlers: None) -> None:
    stop = threading.Event()
    stop_on_signals(stop)
    stop.set()  # as share_stop does
    signal.raise_signal(signal.SIGTERM)
