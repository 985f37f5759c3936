"""Pipelines that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.failure.pipelines import Pipeline

Start = Callable[..., Pipeline]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts pipelines in folders of `tmp_path`, and ends what a failing test leaves of them."""
    started: list[Pipeline] = []

    def start_one(*overrides: str, folder: str = "run", **options: Any) -> Pipeline:
        started.append(Pipeline(tmp_path / folder, *overrides, **options))
        return started[-1]

    yield start_one
    for pipeline in started:
        pipeline.clean_up()
