"""`train.cache` in the sequential and multi-lap orders: what is recalled changes no bit, and saves what it promises."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config
from pipetrgl.data.dataset import Samples
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage, StageOutput
from tests.equivalence.runs import assert_equal_runs, run
from tests.equivalence.test_orders import STEPS_PER_EPOCH, ordered

PLAIN = {"samples": 56, "crop_padding": 0, "flip": False}  # 50 training images in batches of 8, the last one of 2
NO_EVALUATION = {"valid_every": 0.0, "at_start": False, "test_at_end": False}


def cached(
    cache: str, model: str, folder: Path, order: str, stages: int, launcher: str = "serial", /, **sections: Any
) -> Config:
    """Stages learn for 2, 3, .. epochs."""
    sections["train"] = {"epochs": 2, "cache": cache, **sections.get("train", {})}
    return ordered(model, folder, order, stages, launcher, data=PLAIN, **sections)


@pytest.mark.parametrize("model", ["resnet", "vit"])
@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_recalling_equals_forwarding_anew(tmp_path: Path, order: str, model: str) -> None:
    plain = run(cached("none", model, tmp_path / "none", order, 3))
    assert_equal_runs(run(cached("memory", model, tmp_path / "memory", order, 3)), plain)
    assert_equal_runs(run(cached("disk", model, tmp_path / "disk", order, 3, "threads")), plain)
