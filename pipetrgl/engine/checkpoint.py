"""Checkpoint files: one safetensors file a stage, written whole or not at all; the manifest comes last.

checkpoints/step-752/stage-0.safetensors ... stage-3.safetensors manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import final

import safetensors.torch

from pipetrgl.engine.metrics import Sink
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput


@final
class SaveFinal:
    """Writes the stage's weights when the stream has ended, and tells the sink which file holds them."""

    def __init__(self, stage: Stage, run: Path, sink: Sink) -> None:
        self._stage = stage
        self._run = run
        self._sink = sink

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        pass

    def close(self) -> None:
        folder = self._run / "checkpoints" / f"step-{self._stage.num_updates}"
        path = folder / f"stage-{self._stage.index}.safetensors"
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self._stage.state().items()}
        digest = write_atomically(path, safetensors.torch.save(state))
        file = str(path.relative_to(self._run))
        self._sink({"kind": "file", "stage": self._stage.index, "file": file, "sha256": digest})


def write_atomically(path: Path, content: bytes) -> str:
    """Temporary file, fsync, rename: a reader sees the old file or the whole new one. Returns the content's SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def write_manifest(folder: Path, files: Sequence[tuple[str, str]], config_hash: str) -> None:
    """The list that makes a checkpoint complete: (file name, SHA-256) of every stage."""
    content = {"format": 1, "config": config_hash, "files": dict(sorted(files))}
    write_atomically(folder / "manifest.json", json.dumps(content, indent=2).encode())
