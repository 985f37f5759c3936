"""Small runs of every architecture, and what must be equal between two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pipetrgl.config.schema import Config
from pipetrgl.launchers.start import train

# Eight blocks or more each, so that K = 8 is possible, on 3x8x8 or 3x32x32 images, or on rows of 6 bytes.
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"name": "resnet", "stem": "cifar16", "depth": 26, "width": 4},
    "resnet_preact": {"name": "resnet_preact", "depth": 8, "width": 4},
    "vgg": {"name": "vgg", "depth": 11, "width": 4},
    "mlp": {"name": "mlp", "depth": 8, "width": 16, "dropout": 0.1, "head": {"name": "pool_linear"}},
    "vit": {
        "name": "vit", "depth": 8, "width": 12, "num_heads": 2, "patch": 8, "dropout": 0.1, "drop_path": 0.1,
        "head": {"name": "tokens"},
    },
    "gpt": {"name": "gpt", "depth": 8, "width": 12, "num_heads": 2, "dropout": 0.1, "drop_path": 0.1},
}  # fmt: skip
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
TIMES = {"images_per_s", "wait_share"}


def tiny(model: str, folder: Path, /, **sections: Any) -> Config:
    """A run of 30 steps with three micro-batch shapes, validation every half epoch, and a test at the end."""
    size = 32 if model in ("vgg", "vit") else 8
    images = {
        "name": "synthetic",
        "shape": [3, size, size],
        "samples": 136,
        "num_classes": 4,
        "crop_padding": 1,
        "flip": True,
    }
    content: dict[str, Any] = {
        "data": {"name": "text", "root": str(TEXT), "context": 6} if model == "gpt" else images,
        "model": MODELS[model],
        "train": {"epochs": 2, "batch": 8, "max_steps": 30, "accumulate": 2 if model == "vit" else 1},
        "evaluate": {"valid_every": 0.5, "at_start": True, "batch": 7},
        "objective": {"label_smoothing": 0.1, "transport": {"tau": 0.5}},
        "optim": {"lr": 0.05, "schedule": {"name": "cosine"}},
        "metrics": {"every": 5},
        "run": {"folder": str(folder), "report": False},
    }  # fmt: skip
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    return Config.model_validate(content)


def run(config: Config) -> Path:
    """Train; the run folder."""
    result = train(config, lambda blueprint, folder: lambda row: None)
    assert result is not None
    return Path(result["run"])


def weights(folder: Path) -> dict[str, Tensor]:
    """Every final weight and buffer of a run, by name, whatever its stages."""
    state: dict[str, Tensor] = {}
    newest = max(folder.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for file in sorted(newest.glob("stage-*.safetensors")):
        state |= safetensors.torch.load_file(file)
    return state


def metrics(folder: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Every row without its times, by (kind, stage, step)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]
    return {(row["kind"], row["stage"], row["step"]): row for row in rows}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit-equal weights, buffers and metrics."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert mine
    different = [name for name in mine if not mine[name].equal(theirs[name])]
    assert different == []
    assert metrics(one) == metrics(other)
