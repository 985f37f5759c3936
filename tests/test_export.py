"""One file of a run's network up to a head: what it answers, what it holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipetrgl.data import catalogue
from pipetrgl.data.augment import normalise
from pipetrgl.errors import ConfigError
from pipetrgl.export import load
from pipetrgl.launchers.scoring import export_run
from tests.equivalence.runs import run, tiny, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return run(tiny("resnet", folder, pipeline={"stages": 3}, launcher={"name": "serial"}))


@pytest.mark.parametrize("head", ["0", "1", "last", "best"])
def test_the_exported_network_scores_what_the_run_scored(trained: Path, tmp_path: Path, head: str) -> None:
    exported = export_run(trained, None, head, tmp_path / "model.safetensors")
    model = load(exported.path)
    config = tiny("resnet", tmp_path)
    data = catalogue.load(config.data, config.seed)
    images = normalise(data.test.read(range(len(data.test))), model.about.mean, model.about.std)  # type: ignore[arg-type]
    with torch.no_grad():
        right = model(torch.from_numpy(images)).argmax(1) == torch.from_numpy(data.test.labels)
    result = json.loads((trained / "result.json").read_text())
    assert exported.head == {"last": 2, "best": result["best_head"]}.get(head, exported.head)
    assert float(right.double().mean()) == result["stages"][exported.head]["test_accuracy"]


def test_weights_are_those_of_the_run_under_the_networks_names(trained: Path, tmp_path: Path) -> None:
    export_run(trained, None, "0", tmp_path / "one.safetensors")
    ours, state = safetensors.torch.load_file(tmp_path / "one.safetensors"), weights(trained)
    assert all(tensor.equal(state[name]) for name, tensor in ours.items() if not name.startswith("head."))
    assert "layer1.0.conv1.weight" in ours and "head.linear.weight" in ours
    assert not any(name.startswith(("layer3", "heads.")) for name in ours)  # of later stages, and of other heads


def test_what_there_is_not_is_refused(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match=r"--head: '3' is not allowed. Allowed: best, last, 0 to 2"):
        export_run(trained, None, "3", out)
    with pytest.raises(ConfigError, match="step-7: no readable manifest"):
        export_run(trained, 7, "last", out)
    with pytest.raises(ConfigError, match="is not a run folder"):
        export_run(tmp_path, None, "last", out)
    assert not out.exists()


def test_a_file_that_is_no_export_is_refused(trained: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "text.safetensors", tmp_path / "other.safetensors"
    text.write_text("no tensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match="no readable safetensors file"):
        load(text)
    with pytest.raises(ConfigError, match="not written by pipetrgl export"):
        load(other)
    with safetensors.safe_open(export_run(trained, None, "0", tmp_path / "m.safetensors").path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"x": torch.zeros(1)}, other, metadata)
    with pytest.raises(ConfigError, match="damaged, or of another version"):
        load(other)
