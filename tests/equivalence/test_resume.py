"""Resuming equals never stopping: weights, optimizer, metrics and sample order, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.contracts import NullOutbox
from pipetrgl.config.load import dump
from pipetrgl.engine import checkpoint, saving
from pipetrgl.engine.checkpoint import Checkpoint, newest_complete
from pipetrgl.engine.metrics import TrainMetrics
from pipetrgl.errors import ConfigError, LaunchError, ModelError
from pipetrgl.launchers.start import describe
from pipetrgl.stage import Stage
from pipetrgl.worker import build_stage
from tests.equivalence.runs import MODELS, assert_equal_runs, run, tiny

LONG: dict[str, Any] = {"pipeline": {"stages": 3}, "train": {"max_steps": 300, "epochs": 30}}
AT_THE_END = saving.SaveSchedule(every=0, final=True, total_steps=0)
ADAM = {"name": "adamw", "lr": 0.01}


def break_once(monkeypatch: pytest.MonkeyPatch, stage: int, step: int) -> None:
    """The first time that `stage` is about to take optimizer step `step`, its worker dies."""
    update, struck = Stage.update, []

    def fail(self: Stage) -> None:
        if (self.index, self.num_updates) == (stage, step) and not struck:
            struck.append(True)
            raise LaunchError("injected")
        update(self)

    monkeypatch.setattr(Stage, "update", fail)


# Step 5 is before the first checkpoint of 7; 7 right after it; 16 after an evaluation; 29 the last, between two rows.
@pytest.mark.parametrize(("stage", "step"), [(0, 5), (2, 7), (1, 16), (2, 29), (0, 29)])
@pytest.mark.parametrize("model", ["resnet", "vit", "gpt"])
def test_a_run_whose_stage_fails_once_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, stage: int, step: int
) -> None:
    options: dict[str, Any] = {"pipeline": {"stages": 3}, "optim": ADAM if model == "vit" else {}}
    options["checkpoint"] = {"every": 7}
    undisturbed = run(tiny(model, tmp_path / "a", launcher={"name": "serial"}, **options))
    break_once(monkeypatch, stage, step)
    disturbed = run(tiny(model, tmp_path / "b", launcher={"name": "threads", "max_failures": 1}, **options))
    rows = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    (note,) = [row for row in rows if row["kind"] == "log"]
    # a stage that runs ahead may have completed its own file, but a checkpoint needs all of them
    assert note["message"].startswith("injected; starting all workers again from step ")
    (disturbed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["kind"] != "log"))
    assert_equal_runs(disturbed, undisturbed)


def test_a_run_killed_after_its_last_step_writes_its_last_rows_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "pipeline": {"stages": 2},
        "launcher": {"name": "serial"},
        "checkpoint": {"every": 10, "resume": "auto"},
        "metrics": {"every": 4},  # the last row covers two steps only
    }
    undisturbed = run(tiny("resnet", tmp_path / "a", **options))
    killed = run(tiny("resnet", tmp_path / "b", **options))
    (killed / "result.json").unlink()
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    # both stages' evaluations are lost; their train rows were written before the checkpoint was complete
    (killed / "metrics.jsonl").write_text("".join(lines[:-4]) + '{"kind": "tr')
    assert run(tiny("resnet", tmp_path / "b", **options)) == killed
    assert_equal_runs(killed, undisturbed)


def test_more_failures_than_allowed_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_once(monkeypatch, 0, 3)
    with pytest.raises(LaunchError, match="injected"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"name": "threads"}))


def test_auto_goes_on_in_the_folder_of_the_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "pipeline": {"stages": 2},
        "checkpoint": {"every": 4, "resume": "auto"},
        "objective": {"transport": {"multipliers": {"enabled": True, "every": 3}}},
    }
    undisturbed = run(tiny("mlp", tmp_path / "a", launcher={"name": "serial"}, **options))
    config = tiny("mlp", tmp_path / "b", launcher={"name": "threads"}, **options)
    with monkeypatch.context() as patch:
        break_once(patch, 1, 13)
        with pytest.raises(LaunchError, match="injected"):
            run(config)
    resumed = run(config)
    assert [folder.name for folder in (tmp_path / "b").iterdir()] == [resumed.name]
    assert_equal_runs(resumed, undisturbed)
    assert run(config) != resumed  # a finished run is not gone on with


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts runs of 300 steps in processes, with a checkpoint every 20; ends what a failing test leaves of them."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(folder: Path, command: list[str], **options: Any) -> subprocess.Popen[str]:
        folder.mkdir()
        options = {**LONG, **options, "checkpoint": {"every": 20}}
        (folder / "config.yaml").write_text(dump(tiny("mlp", folder / "runs", **options)))
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, "train", "config.yaml"],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start_one
    for process in processes:
        if process.poll() is None:
            process.terminate()  # both launchers end their workers on SIGTERM
        process.communicate(timeout=60)


def finished(folder: Path, process: subprocess.Popen[str]) -> Path:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (only,) = (folder / "runs").iterdir()
    return only


def kill_one_worker(folder: Path, pattern: str, which: int) -> None:
    """SIGKILL one of the run's workers, which work in `folder`, once the first checkpoint is complete."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("runs/*/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint was completed"
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-f", "--", pattern], capture_output=True, text=True, check=True)
    # only ours: another run on this machine may have the same command line
    ours = [
        number for number in sorted(map(int, found.stdout.split())) if Path(f"/proc/{number}/cwd").resolve() == folder
    ]
    os.kill(ours[which], signal.SIGKILL)


def without_logs(folder: Path) -> Path:
    """Drop the note of the restart, which an undisturbed run does not have."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"kind": "log"' not in line))
    return folder


def test_local_and_torchrun_start_again_after_a_kill_and_equal_an_undisturbed_run(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    undisturbed = run(tiny("mlp", tmp_path / "serial", launcher={"name": "serial"}, checkpoint={"every": 20}, **LONG))
    process = start(tmp_path / "local", ["-m", "pipetrgl"], launcher={"max_failures": 1})
    kill_one_worker(tmp_path / "local", f"pipetrgl.launchers.local {tmp_path}/local", which=1)
    local = finished(tmp_path / "local", process)
    assert '"kind": "log"' in (local / "metrics.jsonl").read_text()
    assert_equal_runs(without_logs(local), undisturbed)

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts", "1"]
    process = start(tmp_path / "torchrun", [*torchrun, "-m", "pipetrgl"])
    # the agent's own command line holds "-m pipetrgl" too; its workers' has "-u" before it
    kill_one_worker(tmp_path / "torchrun", "-u -m pipetrgl train config.yaml", which=1)
    assert_equal_runs(finished(tmp_path / "torchrun", process), undisturbed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its two newest checkpoints, steps 28 and 30."""
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "serial"}, "checkpoint": {"every": 7}}
    return run(tiny("resnet", tmp_path_factory.mktemp("saved"), **options))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_only_the_newest_complete_checkpoints_are_kept(saved: Path) -> None:
    assert sorted(folder.name for folder in (saved / "checkpoints").iterdir()) == ["step-28", "step-30"]
    newest = newest_complete(saved)
    assert newest is not None
    assert newest.step == 30


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [damage, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(copy: Path, harm: Any, caplog: Any) -> None:
    import logging

    logging.getLogger("pipetrgl").addHandler(caplog.handler)
    harm(copy / "checkpoints" / "step-30" / "stage-1.safetensors")
    found = newest_complete(copy)
    logging.getLogger("pipetrgl").removeHandler(caplog.handler)
    assert found is not None
    assert found.step == 28
    assert "taking the one before" in caplog.text


def test_a_checkpoint_without_its_manifest_is_not_complete(copy: Path) -> None:
    (copy / "checkpoints" / "step-30" / "manifest.json").unlink()
    found = newest_complete(copy)
    assert found is not None
    assert found.step == 28


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("not json", "no readable manifest"),
        ("[]", "no readable manifest"),
        ('{"format": 9, "step": 30, "files": {}}', "format 9, expected 1"),
        ('{"format": 1, "step": 30, "files": {"../../config.yaml": "0"}}', "is missing"),
    ],
)
def test_a_hostile_manifest_is_refused(copy: Path, manifest: str, message: str) -> None:
    folder = copy / "checkpoints" / "step-30"
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match=message):
        Checkpoint.read(folder)


@pytest.mark.parametrize("content", ["a pickle that writes a file", "text", "a huge header"])
def test_a_hostile_file_with_a_matching_manifest_is_refused_and_runs_no_code(
    copy: Path, tmp_path: Path, content: str
) -> None:
    import hashlib
    import pickle

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/attacked",)

    hostile = {
        "a pickle that writes a file": pickle.dumps(Attack()),
        "text": b"weights",
        "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    }[content]
    folder = copy / "checkpoints" / "step-30"
    (folder / "stage-0.safetensors").write_bytes(hostile)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["stage-0.safetensors"] = hashlib.sha256(hostile).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}, "train": {"max_steps": 32}}
    with pytest.raises(ConfigError, match=r"stage-0.safetensors is no safetensors file"):
        run(tiny("resnet", tmp_path, checkpoint={"resume": str(copy)}, **options))
    assert not (tmp_path / "attacked").exists()


def test_a_checkpoint_can_be_read_with_other_cuts(saved: Path, tmp_path: Path) -> None:
    newest = newest_complete(saved)
    assert newest is not None
    states = []
    for stages in (2, 4):
        config = tiny("resnet", tmp_path, pipeline={"stages": stages})
        blueprint = draw_up(config, describe(config))
        state = {}
        for index in range(stages):
            stage = build_stage(blueprint, index, torch.device("cpu"))
            metrics = TrainMetrics(stage, _NoInbox(), NullOutbox(), lambda row: None, 5)
            newest.load_into(stage, metrics)
            state |= {**stage.state(), **stage.optimizer_state()}
        states.append({name: tensor for name, tensor in state.items() if "heads." not in name})
    two, four = states
    assert two.keys() == four.keys()
    assert any(name.startswith("optimizer.") for name in two)
    assert all(tensor.equal(four[name]) for name, tensor in two.items())


class _NoInbox:
    waited_s = 0.0

    def __iter__(self) -> Any:
        return iter(())

    def close(self) -> None:
        pass


def test_resume_from_a_folder_without_checkpoint_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint.resume: '.*' holds no complete checkpoint"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2}, checkpoint={"resume": str(tmp_path)}))


def test_a_finished_checkpoint_leaves_a_new_run_nothing_to_train(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 30 steps, but this run has only 30; raise train.epochs"):
        run(tiny("resnet", tmp_path, pipeline={"stages": 2}, checkpoint={"resume": str(saved)}))


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    model = {**MODELS["resnet"], "width": 8}
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}, "model": model}
    with pytest.raises(ModelError, match=r"the checkpoint holds .* of shape .* it is of another model"):
        run(tiny("resnet", tmp_path, checkpoint={"resume": str(saved)}, train={"max_steps": 32}, **options))


def test_another_optimizer_starts_without_the_old_ones_memory(saved: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}, "optim": ADAM}
    folder = run(tiny("resnet", tmp_path, checkpoint={"resume": str(saved)}, train={"max_steps": 32}, **options))
    result = json.loads((folder / "result.json").read_text())
    assert (result["first_step"], result["num_steps"]) == (30, 32)


def test_a_new_run_whose_worker_dies_at_once_still_goes_on_from_the_other_runs_checkpoint(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "train": {"max_steps": 32}}
    options["checkpoint"] = {"resume": str(saved)}
    undisturbed = run(tiny("resnet", tmp_path / "a", launcher={"name": "serial"}, **options))
    break_once(monkeypatch, 1, 31)
    disturbed = run(tiny("resnet", tmp_path / "b", launcher={"name": "threads", "max_failures": 1}, **options))
    assert_equal_runs(without_logs(disturbed), undisturbed)


def test_going_on_from_an_earlier_checkpoint_removes_the_later_ones(copy: Path) -> None:
    checkpoint.drop_after(copy, 28)
    assert [folder.name for folder in (copy / "checkpoints").iterdir()] == ["step-28"]


def test_weights_that_are_not_finite_make_no_checkpoint(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path, pipeline={"stages": 1})
    stage = build_stage(draw_up(config, describe(config)), 0, torch.device("cpu"))
    next(iter(stage.state().values())).fill_(float("nan"))
    rows: list[dict[str, Any]] = []
    metrics = TrainMetrics(stage, _NoInbox(), NullOutbox(), rows.append, 5)
    saving.SaveCheckpoints(stage, metrics, NullOutbox(), tmp_path, rows.append, AT_THE_END).close()
    assert rows == [{"kind": "last", "stage": 0, "step": 0}]  # the stream's end, and no file
    assert not (tmp_path / "checkpoints").exists()


def test_a_disk_that_is_full_stops_no_training_and_leaves_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_atomically

    def full(path: Path, content: bytes) -> str:
        if path.parent.name == "step-14":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(saving, "write_atomically", full)
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}, "train": {"max_steps": 15}}
    folder = run(tiny("mlp", tmp_path, checkpoint={"every": 7}, run={"save_final": False}, **options))
    assert json.loads((folder / "result.json").read_text())["num_steps"] == 15
    newest = newest_complete(folder)
    assert newest is not None
    assert newest.step == 7


def test_a_change_right_after_the_save_does_not_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    gate, write = threading.Event(), saving.write_atomically
    monkeypatch.setattr(saving, "write_atomically", lambda *given: (gate.wait(20), write(*given))[1])
    config = tiny("mlp", tmp_path, pipeline={"stages": 1})
    stage = build_stage(draw_up(config, describe(config)), 0, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    metrics = TrainMetrics(stage, _NoInbox(), NullOutbox(), rows.append, 5)
    saver = saving.SaveCheckpoints(stage, metrics, NullOutbox(), tmp_path, rows.append, AT_THE_END)
    before = {name: tensor.clone() for name, tensor in stage.state().items()}
    closing = threading.Thread(target=saver.close)
    closing.start()
    while saver._writer is None:
        time.sleep(0.01)
    with torch.no_grad():
        for tensor in stage.state().values():
            tensor.zero_()
    gate.set()
    closing.join()
    import safetensors.torch

    written = safetensors.torch.load_file(tmp_path / "checkpoints" / "step-0" / "stage-0.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in before.items())
