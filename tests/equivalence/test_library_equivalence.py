"""Models of other libraries, cut into two stages: threads end with the weights of the serial loop, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipetrgl.config.schema import ModelConfig
from tests.equivalence.runs import assert_equal_runs, run, tiny, weights


@pytest.mark.parametrize(
    "model",
    [
        {"name": "torchvision:resnet18"},
        {"name": "torchvision:swin_t", "cuts": [4, 8], "head": {"name": "pool_linear"}},
        {"name": "timm:vit_tiny_patch16_224", "drop_path": 0.1, "head": {"name": "tokens"}},
    ],
    ids=lambda model: model["name"],
)
def test_threads_equal_serial(tmp_path: Path, model: dict[str, Any]) -> None:
    def folder(launcher: str) -> Path:
        config = tiny(
            "resnet", tmp_path / launcher,
            data={"shape": [3, 32, 32]},
            pipeline={"stages": 2},
            train={"max_steps": 3, "accumulate": 2},
            evaluate={"valid_every": 0, "at_start": False},
            launcher={"name": launcher},
        )  # fmt: skip
        return run(config.model_copy(update={"model": ModelConfig.model_validate(model)}))

    threads = folder("threads")
    assert_equal_runs(threads, folder("serial"))
    assert len(weights(threads)) > 100
