"""What a worker brings along: torch, but not its compiler, whose import takes as long as torch's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("launcher", "overrides", "imported"),
    [
        (["-m", "pipetrgl", "train"], [], False),
        (["-m", "pipetrgl", "train"], ["optim.name=adamw"], False),
        (["-m", "pipetrgl", "train"], ["train.recompute=true"], True),  # torch's checkpoint brings it
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipetrgl", "train"], [], False),
    ],
)
def test_a_worker_does_not_import_the_compiler_that_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: list[str], overrides: list[str], imported: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTES_IMPORTS)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, *launcher, "config.yaml", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    logs = [log.read_text() for log in tmp_path.glob("runs/*/logs/*.log")]
    if "torch.distributed.run" in launcher:  # rank 0 finds the shapes for all, and only it
        assert done.stderr.count("the compiler was imported") == 1
    else:
        assert len(logs) == 2
        assert [("the compiler was imported" in log) for log in logs] == [imported] * 2
