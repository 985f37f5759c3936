"""The command line as a user meets it: one clear message, an exit code, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipetrgl.config.load import dump
from tests.equivalence.runs import tiny

ROOT = Path(__file__).resolve().parents[1]


def pipetrgl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipetrgl", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that ended with exit code 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ")


def test_every_mistake_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "data:\n  name: cifar\nobjective:\n  transport:\n    tua: 3\npipline:\n  stages: 4\ntrain: {epochs: many}\n"
    )
    message = refused(pipetrgl(tmp_path, "train", "bad.yaml"))
    assert message.startswith("4 problems in bad.yaml\n")
    assert "line 2   data.name: 'cifar' is not allowed. Did you mean 'cifar10'? Allowed: " in message
    assert "line 5   objective.transport.tua: unknown key. Did you mean 'tau'? Allowed: " in message
    assert "line 6   pipline: unknown key. Did you mean 'pipeline'? Allowed: " in message
    assert "line 8   train.epochs: 'many' is a str" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline.stages=60"], "60 stages need at least 60 blocks, but this network has 9"),
        (["pipeline.stages=2", "model.cuts=[layer1.0.conv1]"], "'layer1.0.conv1' lies inside block 'layer1.0'"),
        (["pipeline.stages=2", "model.cuts=[4,4]"], "4 + 4 = 8 blocks, but this network has 9"),
        (["model.depth=21"], "depth 21"),
        (["model.head.name=tokens"], "tokens"),
        (["objective.transport.kind=stage"], "'stage' needs equal shapes, but stage"),
        (["objective.transport.tau=1.0e-9"], "objective.transport.tau: 1e-09 in stage 0 is below"),
        (["model.depth=14", "model.name=torchvision:resnet19"], "no classifier 'resnet19'. Did you mean"),
        (["model.depth=14", "model.name=timm:vit_tiny_patch17_224"], "Nearest: 'vit_tiny_patch16_224'"),
        (
            ["model.depth=14", "model.name=timm:vit_tiny_patch16_224", "model.head.name=tokens", "objective=infopro"],
            "'infopro' needs the reconstruction of an image or a map",
        ),
        (["data.name=cifar10", "data.root=nowhere"], "nowhere"),
        (["train.batch=100000", "train.drop_last=true"], "too few for one step of 100000 rows"),
        (["run.folder=/proc/nothing"], "run.folder: cannot write to '/proc/nothing'"),
    ],
)
def test_bad_input_is_one_message_before_any_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "config.yaml").write_text("model: {depth: 20}\npipeline: {stages: 3}\n")
    assert message in refused(pipetrgl(tmp_path, "train", "config.yaml", *overrides))


def test_a_missing_config_and_a_malformed_override_are_one_message(tmp_path: Path) -> None:
    assert "nothing.yaml" in refused(pipetrgl(tmp_path, "train", "nothing.yaml"))
    (tmp_path / "config.yaml").write_text("")
    assert "override" in refused(pipetrgl(tmp_path, "validate", "config.yaml", "train.epochs"))


def test_a_truncated_data_file_names_what_was_got_and_expected(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"short")
    (tmp_path / "config.yaml").write_text("data: {name: cifar10, root: .}\n")
    message = refused(pipetrgl(tmp_path, "validate", "config.yaml"))
    assert "data_batch_1.bin" in message
    assert "5 bytes" in message
    assert "30,730,000" in message or "30730000" in message


def test_validate_prints_stages_cuts_and_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {depth: 14, cuts: [2, 4]}\npipeline: {stages: 2}\n")
    done = pipetrgl(tmp_path, "validate", "config.yaml")
    assert done.returncode == 0
    assert "stage 0: stem .. layer1.1 | (1, 28, 28) -> (16, 28, 28)" in done.stdout
    assert "replica 0   rank 0     rank 1" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_validate_prints_the_phases_where_stages_learn_one_by_one(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path / "runs", pipeline={"stages": 2}, train={"order": "multi_lap", "laps": 2})
    (tmp_path / "config.yaml").write_text(dump(config))
    done = pipetrgl(tmp_path, "validate", "config.yaml", "train.max_steps=100", "train.epochs_growth=1")
    # 16 steps an epoch; stage 0 learns for two epochs, stage 1 for three
    assert [line for line in done.stdout.splitlines() if line.startswith("lap")] == [
        "lap 0, stage 0 learns: 2 epochs, steps 1 to 32",
        "lap 0, stage 1 learns: 3 epochs, steps 33 to 80",
        "lap 1, stage 0 learns: 2 epochs, steps 81 to 100",
    ]


def test_schema_is_json_that_names_every_section(tmp_path: Path) -> None:
    schema = json.loads(pipetrgl(tmp_path, "schema").stdout)
    assert {"defaults", "data", "model", "objective", "channel"} <= schema["properties"].keys()


def test_cuda_without_a_device_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("pipeline: {device: cuda}\n")
    done = pipetrgl(tmp_path, "train", "config.yaml")
    assert done.returncode == 3
    assert "torch finds no CUDA device here" in done.stderr


def test_the_torchrun_launcher_says_how_to_start_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("launcher: {name: torchrun}\n")
    done = pipetrgl(tmp_path, "train", "config.yaml")
    assert done.returncode == 3
    assert "runs under torchrun: torchrun --nproc-per-node K -m pipetrgl" in done.stderr


def test_a_wrong_world_size_under_torchrun_shows_the_arithmetic(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path / "runs", pipeline={"stages": 3})
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "pipetrgl", "train", "config.yaml",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "started with 2 workers, but 3 stages need 1 + 1 + 1 = 3" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_progress_is_plain_lines_without_a_terminal_and_ends_with_the_table(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path / "runs", pipeline={"stages": 2}, launcher={"name": "threads"}, run={"report": True})
    (tmp_path / "config.yaml").write_text(dump(config))
    done = pipetrgl(tmp_path, "train", "config.yaml")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("step 30/30 epoch 2/2 | local ") and " img/s | waited " in line for line in lines)
    assert any(line.startswith("test  after step 30/30 | head acc ") for line in lines)
    assert "\x1b" not in done.stdout
    (report,) = tmp_path.glob("runs/*/report.html")
    assert f"report: {report}" in done.stdout
    assert done.stderr == ""


def test_progress_of_one_stage_at_a_time_names_it_and_the_report_is_written(tmp_path: Path) -> None:
    train = {"order": "sequential", "epochs": 1, "max_steps": None}
    options = {"pipeline": {"stages": 2}, "launcher": {"name": "threads"}, "run": {"report": True}}
    (tmp_path / "config.yaml").write_text(dump(tiny("mlp", tmp_path / "runs", train=train, **options)))
    done = pipetrgl(tmp_path, "train", "config.yaml")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    #  16 steps an epoch: a row every 5, and where a phase ends
    steps = [line.split(" | ")[0] for line in lines if line.startswith("step ")]
    assert steps == [
        *(f"step {step}/32 epoch 1/2 stage 0" for step in (5, 10, 15, 16)),
        *(f"step {step}/32 epoch 2/2 stage 1" for step in (20, 25, 30, 32)),
    ]
    heads = [line.split("head acc ")[1].count(".") for line in lines if line.startswith("valid")]
    assert heads == [1, 1, 1, 2, 2]  # at the start, twice an epoch
    assert any(line.startswith("32 steps in ") for line in lines)
    assert list(tmp_path.glob("runs/*/report.html"))
    cut = pipetrgl(tmp_path, "train", "config.yaml", "train.max_steps=9", "run.name=cut")
    assert cut.returncode == 0, cut.stderr  # stage 1 has no row of its own
    assert list(tmp_path.glob("runs/cut-*/report.html"))


def test_a_run_is_scored_again_and_exported(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path, pipeline={"stages": 2}, launcher={"name": "serial"}, train={"max_steps": 6})
    (tmp_path / "tiny.yaml").write_text(dump(config))
    assert pipetrgl(tmp_path, "train", "tiny.yaml").returncode == 0
    (run,) = tmp_path.glob("trgl-*")
    scored = pipetrgl(tmp_path, "evaluate", run.name)
    stages = json.loads((run / "result.json").read_text())["stages"]
    for stage in stages:
        assert f"stage {stage['stage']}: accuracy {100 * stage['test_accuracy']:.2f} %" in scored.stdout
    exported = pipetrgl(tmp_path, "export", run.name, "--head", "last", "--out", "there/model.safetensors")
    assert "blocks of stages 0 to 1 and the head of stage 1, step 6" in exported.stdout
    assert (tmp_path / "there/model.safetensors").is_file()
    assert "is not a run folder" in refused(pipetrgl(tmp_path, "export", "there"))
    assert "'7' is not allowed" in refused(pipetrgl(tmp_path, "export", run.name, "--head", "7"))
