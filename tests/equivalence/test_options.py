"""Precision and kernels keep what the house promises: bit-equal over launchers, and over a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetrgl import precision
from tests.equivalence.runs import assert_equal_runs, run, tiny

SHORT = {"batch": 8, "max_steps": 12, "epochs": 1}
ADAM = {"name": "adamw", "lr": 0.01}
ALL = {"precision": "bf16", "channels_last": True, "recompute": True}


def trained(folder: Path, model: str, launcher: str, train: dict[str, Any], /, **sections: Any) -> Path:
    train = {**SHORT, "accumulate": 2 if model == "vit" else 1, **train}
    return run(tiny(model, folder, pipeline={"stages": 3}, launcher={"name": launcher}, train=train, **sections))


@pytest.mark.parametrize(
    ("model", "train", "optim"),
    [
        ("resnet", {"precision": "bf16"}, {}),
        ("resnet", {"precision": "fp16"}, {}),
        ("resnet", {"channels_last": True}, {}),
        ("vgg", {"channels_last": True, "precision": "fp16"}, {}),  # its last maps are of one pixel
        ("resnet", ALL, {"fused": True}),
        ("vit", {"precision": "fp16", "recompute": True}, {**ADAM, "fused": True}),
        ("resnet_preact", {"precision": "bf16"}, {}),  # under the stability guard
        ("mlp", {"precision": "fp16"}, {}),
    ],
)
def test_threads_equal_serial(tmp_path: Path, model: str, train: dict[str, Any], optim: dict[str, Any]) -> None:
    threads, serial = (trained(tmp_path / name, model, name, train, optim=optim) for name in ("threads", "serial"))
    assert_equal_runs(threads, serial)


@pytest.mark.parametrize(("model", "train"), [("resnet", ALL), ("vgg", {"precision": "fp16", "channels_last": True})])
def test_links_that_make_every_tensor_dense_equal_serial(tmp_path: Path, model: str, train: dict[str, Any]) -> None:
    local, serial = (trained(tmp_path / name, model, name, train) for name in ("local", "serial"))
    assert_equal_runs(local, serial)


@pytest.mark.parametrize("model", ["resnet", "vgg"])
def test_a_link_in_bf16_loses_nothing_of_what_batchnorm_networks_compute_in_bf16(tmp_path: Path, model: str) -> None:
    #  conv ─ BN ─ ReLU end in bf16; float32 on the way out is exact, and so is bf16 on the way in
    same = [
        trained(tmp_path / codec, model, "serial", {"precision": "bf16"}, channel={"codec": codec})
        for codec in ("fp32", "bf16")
    ]
    assert_equal_runs(*same)


@pytest.mark.parametrize(
    ("train", "optim"),
    [
        ({"precision": "fp16"}, {}),
        ({"precision": "fp16", "on_nonfinite": "skip"}, {**ADAM, "fused": True}),
        ({"channels_last": True}, {"fused": True}),  # a momentum read from a file is as dense as its parameter is not
    ],
)
def test_resuming_equals_never_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], optim: dict[str, Any]
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**24)  # overflows at first
    monkeypatch.setattr(precision, "GROWTH_UPDATES", 4)  # and grows more than once in the run

    def one(folder: Path, launcher: dict[str, Any]) -> Path:
        checkpoint = {"every": 5, "resume": "auto"}
        options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": launcher, "checkpoint": checkpoint}
        return run(tiny("resnet", folder, train={**SHORT, **train}, optim=optim, **options))

    undisturbed = one(tmp_path / "a", {"name": "serial"})
    fault = {"name": "threads", "faults": [{"stage": 1, "step": 8, "action": "raise"}]}
    with pytest.raises(RuntimeError, match="fault injected"):
        one(tmp_path / "b", fault)
    assert_equal_runs(one(tmp_path / "b", fault), undisturbed)  # the loss scale is among what is compared
    stages = json.loads((undisturbed / "result.json").read_text())["stages"]
    assert all((stage["skipped_updates"] > 0) is (train.get("precision") == "fp16") for stage in stages)
