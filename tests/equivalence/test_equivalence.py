"""K workers end with the weights of the serial loop, bit for bit: every architecture, K, capacity and launcher."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import dump
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import Split
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import MODELS, assert_equal_runs, metrics, run, tiny, weights

Serial = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Serial:
    """The serial run of a model at K, trained once."""
    done: dict[tuple[str, int], Path] = {}

    def get(model: str, stages: int) -> Path:
        if (model, stages) not in done:
            folder = tmp_path_factory.mktemp("serial")
            config = tiny(model, folder, pipeline={"stages": stages}, launcher={"name": "serial"})
            done[model, stages] = run(config)
        return done[model, stages]

    return get


@pytest.mark.parametrize("capacity", [1, 8])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_threads_equal_serial(serial: Serial, tmp_path: Path, model: str, stages: int, capacity: int) -> None:
    config = tiny(
        model, tmp_path, pipeline={"stages": stages}, launcher={"name": "threads"}, channel={"capacity": capacity}
    )
    assert_equal_runs(run(config), serial(model, stages))


# Processes cost seconds each, so every model, every K and both capacities appear here, not every combination of them;
# benchmarks/exactness.py runs them all.
@pytest.mark.parametrize(
    ("model", "stages", "capacity"),
    [
        ("resnet", 4, 1),
        ("resnet_preact", 2, 8),
        ("vgg", 8, 1),
        ("mlp", 2, 1),
        ("vit", 4, 8),
        ("resnet", 1, 8),
        ("gpt", 4, 1),
    ],
)
def test_local_processes_equal_serial(serial: Serial, tmp_path: Path, model: str, stages: int, capacity: int) -> None:
    config = tiny(model, tmp_path, pipeline={"stages": stages}, channel={"capacity": capacity})
    assert_equal_runs(run(config), serial(model, stages))


@pytest.mark.parametrize(("model", "stages", "capacity"), [("resnet", 2, 8), ("vit", 4, 1)])
def test_torchrun_equals_serial(serial: Serial, tmp_path: Path, model: str, stages: int, capacity: int) -> None:
    config = tiny(model, tmp_path / "runs", pipeline={"stages": stages}, channel={"capacity": capacity})
    (tmp_path / "config.yaml").write_text(dump(config))
    root = Path(__file__).resolve().parents[2]
    environ = {
        **os.environ,
        "NPROC": str(stages),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(root / "launch" / "torchrun.sh"), str(tmp_path / "config.yaml")]
    subprocess.run(command, env=environ, check=True, capture_output=True, cwd=tmp_path, timeout=180)
    (folder,) = (tmp_path / "runs").iterdir()
    assert_equal_runs(folder, serial(model, stages))


@pytest.mark.parametrize("launcher", ["threads", "local"])
def test_links_with_delay_and_jitter_equal_serial(serial: Serial, tmp_path: Path, launcher: str) -> None:
    channel = {"delay_s": 0.1, "jitter_s": 0.1, "capacity": 2}
    config = tiny("mlp", tmp_path, pipeline={"stages": 3}, launcher={"name": launcher}, channel=channel)
    assert_equal_runs(run(config), serial("mlp", 3))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_codecs_are_part_of_the_model_and_equal_over_launchers(tmp_path: Path, codec: str) -> None:
    def folder(name: str) -> Path:
        options = {"pipeline": {"stages": 3}, "launcher": {"name": name}, "channel": {"codec": codec}}
        return run(tiny("resnet", tmp_path / name, **options))

    assert_equal_runs(folder("local" if codec == "int8" else "threads"), folder("serial"))


def test_multipliers_equal_over_launchers(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        options = {"transport": {"multipliers": {"enabled": True, "every": 3}}}
        return run(tiny("resnet", tmp_path / name, objective=options, pipeline={"stages": 2}, launcher={"name": name}))

    threads, serial = folder("threads"), folder("serial")
    assert_equal_runs(threads, serial)
    multipliers = [value for name, value in weights(serial).items() if name.endswith(".multiplier")]
    assert len(multipliers) == 2
    assert all(value > 1 for value in multipliers)


def test_infinite_tau_equals_plain_greedy_learning_bit_for_bit(tmp_path: Path) -> None:
    options = {"pipeline": {"stages": 2}, "launcher": {"name": "serial"}}
    infinite = run(tiny("resnet", tmp_path / "a", objective={"transport": {"tau": float("inf")}}, **options))
    vangl = run(tiny("resnet", tmp_path / "b", objective={"name": "vangl", "transport": {}}, **options))
    assert_equal_runs(infinite, vangl)
    trgl = run(tiny("resnet", tmp_path / "c", **options))
    assert any(not weights(trgl)[name].equal(tensor) for name, tensor in weights(vangl).items())


def test_a_smaller_tau_moves_less(tmp_path: Path) -> None:
    def costs(tau: float) -> list[float]:
        options = {"pipeline": {"stages": 2}, "launcher": {"name": "serial"}, "optim": {"lr": 0.01}}
        folder = run(tiny("resnet_preact", tmp_path / str(tau), objective={"transport": {"tau": tau}}, **options))
        last = {stage: row for (kind, stage, _), row in metrics(folder).items() if kind == "train"}
        return [last[stage]["transport_cost"] for stage in range(2)]

    weak, middle, strong = costs(math.inf), costs(1.0), costs(0.1)
    assert all(less < more for less, more in zip(strong, middle, strict=True))
    assert all(less < more for less, more in zip(middle, weak, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_start_weights_of_a_block_do_not_depend_on_the_number_of_stages(tmp_path: Path, model: str) -> None:
    def start(stages: int) -> dict[str, Tensor]:
        config = tiny(model, tmp_path, pipeline={"stages": stages})
        blueprint = draw_up(config, describe(config))
        state: dict[str, Tensor] = {}
        for index in range(stages):
            state |= build_stage(blueprint, index, torch.device("cpu")).state()
        return state

    one, four = start(1), start(4)
    assert {name for name in one if not name.startswith("heads.")} <= four.keys()
    assert all(tensor.equal(four[name]) for name, tensor in one.items())


def test_no_gradient_reaches_an_earlier_stage(tmp_path: Path) -> None:
    config = tiny("resnet", tmp_path, pipeline={"stages": 2})
    blueprint = draw_up(config, describe(config))
    first, second = (build_stage(blueprint, index, torch.device("cpu")) for index in range(2))
    (micro_batch, *_) = [batch for batch in build_loader(Job(blueprint, tmp_path, {})) if batch.split is Split.TRAIN]
    output = first.forward(micro_batch, train=True)
    handed_on = micro_batch.carrying(output.activation.detach())
    second.backward(second.forward(handed_on, train=True), handed_on)
    assert all(parameter.grad is None for _, parameter in first.named_parameters())
    assert all(parameter.grad is not None for _, parameter in second.named_parameters())


def test_no_port_process_or_folder_is_left_behind(tmp_path: Path) -> None:
    folder = run(tiny("mlp", tmp_path, pipeline={"stages": 2}))
    assert shutil.which("pgrep")
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
