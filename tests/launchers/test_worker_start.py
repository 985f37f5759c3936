"""What a worker brings along: torch, but not its compiler, whose import takes as long as torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.torchrun import Rank, shared_blueprint
from tests.equivalence.runs import tiny

Train = Callable[..., str]

NOTES_IMPORTS = """
import sys

class Watch:
    def find_spec(self, name, path, target=None):
        if name == "torch._dynamo":
            print("the compiler was imported", file=sys.stderr, flush=True)

sys.meta_path.insert(0, Watch())
"""
CONFIG = """
data: {name: synthetic, shape: [3, 8, 8], samples: 32, valid_fraction: 0.25}
model: {name: resnet, stem: cifar16, depth: 8}
train: {epochs: 1, batch: 8}
pipeline: {stages: 2}
run: {folder: runs, report: false}
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipetrgl", "train")
NOTE = "the compiler was imported"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    (tmp_path / "sitecustomize.py").write_text(NOTES_IMPORTS)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.mark.parametrize(
    ("override", "imported"),
    [
        ("optim.name=sgd", False),
        ("optim.name=adamw", False),
        ("train.recompute=true", True),  # torch's checkpoint brings it
    ],
)
def test_a_local_worker_imports_the_compiler_only_where_it_uses_it(
    train: Train, tmp_path: Path, override: str, imported: bool
) -> None:
    train("-m", "pipetrgl", "train", "config.yaml", override)
    assert [NOTE in log.read_text() for log in tmp_path.glob("runs/*/logs/*.log")] == [imported] * 2


def test_of_all_ranks_only_the_first_imports_it_to_find_the_shapes(train: Train) -> None:
    assert train(*TORCHRUN, "config.yaml").count(NOTE) == 1


def test_a_rank_of_another_config_draws_up_its_own_so_that_the_links_can_name_both(tmp_path: Path) -> None:
    mine, theirs = (tiny("mlp", tmp_path, model={"width": width}) for width in (8, 16))
    store, spec = HashStore(), describe(mine)
    first = shared_blueprint(Rank(store, 0, 3, 1), mine, lambda: draw_up(mine, spec), 5.0)
    same, other = (
        shared_blueprint(Rank(store, rank, 3, 1), config, never, 5.0) for rank, config in ((1, mine), (2, theirs))
    )
    assert (same.shapes, same.spec) == (first.shapes, first.spec)
    assert other.shapes == draw_up(theirs, spec).shapes != first.shapes


def never() -> Blueprint:
    raise AssertionError("only rank 0 reads the data")
