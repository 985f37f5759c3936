"""Replicas: R workers of a stage end with the weights of one, to float rounding, and with the same bits as each other.

Without BatchNorm and with synchronised BatchNorm; a row's arithmetic is the same, sums over rows have another order.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipetrgl.config.load import dump, load
from pipetrgl.errors import ConfigError, DataError
from tests.equivalence.runs import assert_equal_runs, metrics, run, tiny, weights

# few updates at a small rate, for rounding errors grow with every step
SHORT: dict[str, Any] = {
    "train": {"max_steps": 8, "accumulate": 2, "batch": 16},
    "optim": {"lr": 0.01},
    "evaluate": {"batch": 12},
    "metrics": {"every": 3},
}
PLAIN = {"name": "mlp", "depth": 6, "width": 16, "batch_norm": False, "dropout": 0.1, "head": {"name": "pool_linear"}}


def lone(model: str, folder: Path, /, **sections: Any) -> Path:
    return run(tiny(model, folder, launcher={"name": "serial"}, **SHORT | sections))


def assert_rounded(name: str, one: Tensor, other: Tensor) -> None:
    """Eight steps of float32 sums in another order; 1e-5 of the largest value was seen, 3 with local BatchNorm."""
    if one.is_floating_point():
        assert (one - other).abs().max() <= 2e-4 * other.abs().max() + 1e-7, name
    else:
        assert one.equal(other), name


def assert_close_runs(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert_rounded(name, tensor, theirs[name])
    expected = metrics(other)
    rows = {key: row for key, row in metrics(one).items() if key[0] != "geometry"}  # one replica's share of the images
    for key, row in rows.items():
        for field, value in row.items():
            if isinstance(value, float):
                assert math.isclose(value, expected[key][field], rel_tol=1e-3, abs_tol=1e-5), (key, field)


@pytest.mark.parametrize("replicas", [[1, 2, 1], [2, 3, 1], [2, 2, 2]])
def test_replicas_without_batch_norm_equal_one(tmp_path: Path, replicas: list[int]) -> None:
    sections: dict[str, Any] = {"model": PLAIN}
    config = tiny(
        "mlp", tmp_path / "r", launcher={"name": "threads"}, pipeline={"stages": 3, "replicas": replicas},
        **SHORT | sections,
    )  # fmt: skip
    assert_close_runs(run(config), lone("mlp", tmp_path / "s", pipeline={"stages": 3}, **sections))


@pytest.mark.parametrize("model", ["resnet", "vit", "gpt"])
def test_replicas_with_synchronised_batch_norm_equal_one(tmp_path: Path, model: str) -> None:
    pipeline = {"stages": 2, "replicas": [1, 3], "batch_norm": "synchronised"}
    config = tiny(model, tmp_path / "r", launcher={"name": "threads"}, pipeline=pipeline, **SHORT)
    assert_close_runs(run(config), lone(model, tmp_path / "s", pipeline={"stages": 2}))


def test_replicas_recompute_synchronised_batch_norm(tmp_path: Path) -> None:
    """The sums of the second forward pass come in the same order on all replicas; the bits are those without it."""
    pipeline = {"stages": 2, "replicas": [1, 2], "batch_norm": "synchronised"}
    folders = []
    for recompute in (False, True):
        sections = SHORT | {"train": {**SHORT["train"], "recompute": recompute}}
        config = tiny("resnet", tmp_path / str(recompute), launcher={"name": "threads"}, pipeline=pipeline, **sections)
        folders.append(run(config))
    assert_equal_runs(*folders)


def test_processes_and_threads_agree_bit_for_bit_with_two_replicas(tmp_path: Path) -> None:
    """Of two terms there is one sum, whatever adds them up; local BatchNorm, whose statistics are averaged."""
    pipeline = {"stages": 2, "replicas": [2, 1]}
    threads = run(tiny("resnet", tmp_path / "t", launcher={"name": "threads"}, pipeline=pipeline, **SHORT))
    local = run(tiny("resnet", tmp_path / "l", pipeline=pipeline, **SHORT))
    assert_equal_runs(local, threads)
    result = json.loads((local / "result.json").read_text())
    assert [len(stage["replicas"]) for stage in result["stages"]] == [2, 1]
    assert len({worker["pid"] for stage in result["stages"] for worker in stage["replicas"]}) == 3


def test_ranks_of_torchrun_may_be_replicas(tmp_path: Path) -> None:
    pipeline = {"stages": 2, "replicas": [1, 2]}
    threads = run(tiny("resnet", tmp_path / "t", launcher={"name": "threads"}, pipeline=pipeline, **SHORT))
    (tmp_path / "config.yaml").write_text(dump(tiny("resnet", tmp_path / "runs", pipeline=pipeline, **SHORT)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
    subprocess.run(
        [str(script), "config.yaml"], env={**os.environ, "NPROC": "3", "PATH": path}, cwd=tmp_path, check=True,
        capture_output=True, timeout=180,
    )  # fmt: skip
    (folder,) = (tmp_path / "runs").iterdir()
    assert_equal_runs(folder, threads)


def test_a_multiplier_is_the_same_on_all_replicas(tmp_path: Path) -> None:
    objective = {"transport": {"multipliers": {"enabled": True, "every": 2}}}
    sections: dict[str, Any] = {"model": PLAIN, "objective": objective}
    pipeline = {"stages": 2, "replicas": 2}
    config = tiny("mlp", tmp_path / "r", launcher={"name": "threads"}, pipeline=pipeline, **SHORT | sections)
    assert_close_runs(run(config), lone("mlp", tmp_path / "s", pipeline={"stages": 2}, **sections))


def test_a_sequential_order_passes_through_replicas(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": PLAIN, "train": {"order": "sequential", "epochs": 1, "batch": 16, "accumulate": 2},
    }  # fmt: skip
    pipeline = {"stages": 3, "replicas": [1, 2, 2]}
    config = tiny("mlp", tmp_path / "r", launcher={"name": "threads"}, pipeline=pipeline, **SHORT | sections)
    assert_close_runs(run(config), lone("mlp", tmp_path / "s", pipeline={"stages": 3}, **sections))


def test_a_run_resumes_with_other_replicas_and_the_same_ones_exactly(tmp_path: Path) -> None:
    def config(folder: str, replicas: list[int], steps: int, resume: str = "never") -> Any:
        sections = SHORT | {"train": {**SHORT["train"], "max_steps": steps}, "model": PLAIN}
        return tiny(
            "mlp", tmp_path / folder, launcher={"name": "threads"}, pipeline={"stages": 2, "replicas": replicas},
            checkpoint={"every": 4, "resume": resume}, optim={"lr": 0.01, "schedule": {"name": "constant"}},
            **{name: section for name, section in sections.items() if name != "optim"},
        )  # fmt: skip

    undisturbed = run(config("undisturbed", [2, 1], 8))
    half = run(config("half", [2, 1], 4))
    assert_equal_final_weights(run(config("same", [2, 1], 8, str(half))), undisturbed)
    other = weights(run(config("other", [1, 3], 8, str(half))))
    for name, tensor in weights(undisturbed).items():
        assert_rounded(name, other[name], tensor)


def assert_equal_final_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []


def test_a_step_that_one_replica_must_skip_is_skipped_by_all(tmp_path: Path) -> None:
    config = tiny(
        "mlp", tmp_path, pipeline={"stages": 2, "replicas": [1, 2]},
        launcher={"name": "threads", "faults": [{"stage": 1, "step": 3, "action": "nan"}]},
        **SHORT | {"model": PLAIN, "train": {**SHORT["train"], "on_nonfinite": "skip"}},
    )  # fmt: skip
    result = json.loads((run(config) / "result.json").read_text())
    assert [stage["skipped_updates"] for stage in result["stages"]] == [0, 1]


def test_impossible_replicas_are_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("pipeline: {stages: 2, replicas: [1, 2, 1]}\n")
    with pytest.raises(ConfigError, match=r"pipeline\.replicas: 3 given; pipeline\.stages = 2 needs one a stage"):
        load(file)
    file.write_text("pipeline: {stages: 2, replicas: 8}\ntrain: {batch: 16, accumulate: 4}\nevaluate: {batch: 31}\n")
    with pytest.raises(
        ConfigError, match=r"(?s)train\.batch: 16 rows in 4 .* needs 16.*evaluate\.batch: 31 .* need 32"
    ):
        load(file)
    sections: dict[str, Any] = {"train": {"batch": 8}, "evaluate": {"batch": 8}}
    with pytest.raises(DataError, match="the last step of an epoch has 2 rows, but these replicas need 4"):
        run(tiny("mlp", tmp_path, pipeline={"stages": 2, "replicas": 2}, **sections))
