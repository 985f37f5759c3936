"""Checkpoints on disk: which are complete and undamaged, and how a stage goes on from one.

    checkpoints/step-752/stage-0.safetensors ... stage-3.safetensors manifest.json

Keys are names of the network, so another number of stages or other cuts can read them. The manifest comes last and
makes the checkpoint complete. How they are written: engine/saving.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
from torch import Tensor

from pipetrgl.engine.metrics import TrainMetrics
from pipetrgl.errors import ConfigError
from pipetrgl.stage import Stage

logger = logging.getLogger(__name__)

_FORMAT = 1
MANIFEST = "manifest.json"


@final
@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: of its files.
        step: optimizer steps that it holds.
        files: file name -> SHA-256.
        updates: each stage's own, by the name of its first block; empty in the parallel order.
    """

    folder: Path
    step: int
    files: Mapping[str, str]
    updates: Mapping[str, int]

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """Read the manifest and verify every file.

        Raises:
            ConfigError: no manifest, a file is missing, damaged or not what the manifest says; runs no code from it.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            step, files = int(manifest["step"]), {str(name): str(digest) for name, digest in manifest["files"].items()}
            updates = {str(name): int(count) for name, count in manifest.get("updates", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"checkpoint {folder}: no readable {MANIFEST}; it is not complete ({error})") from error
        if manifest.get("format") != _FORMAT:
            raise ConfigError(f"checkpoint {folder}: format {manifest.get('format')}, expected {_FORMAT}")
        return Checkpoint(folder, step, files, updates).verified()

    def verified(self) -> Checkpoint:
        """This checkpoint, after its files were compared with their SHA-256.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        for name, digest in self.files.items():
            _verify(self.folder, name, digest)
        return self

    def require_fit(self, run: Path, total_steps: int, updates: Mapping[str, int]) -> None:
        """Compare with the length and order of the run that goes on from it.

        Args:
            run: its folder.
            total_steps: its length.
            updates: what it would have given each stage by the checkpoint's step.
        Raises:
            ConfigError: nothing is left to train, only the run's own last evaluation may be; or its order would have
                given the stages other updates.
        """
        own = run in self.folder.parents
        if self.step > total_steps or (self.step == total_steps and not own):
            raise ConfigError(
                f"checkpoint.resume: {self.folder} holds {self.step} steps, but this run has only {total_steps}; "
                "raise train.epochs or train.max_steps"
            )
        if self.updates != updates:
            raise ConfigError(
                f"checkpoint.resume: {self.folder} holds step {self.step} of {_by_stage(self.updates)}, but here that "
                f"would be a step of {_by_stage(updates)}; only a run with the same order, stages and epochs can go on"
            )

    def load_into(self, stage: Stage, metrics: TrainMetrics) -> None:
        """Set weights, buffers, optimizer and sums of a stage, from whichever files hold its names."""
        prefixes = (f"metrics.{stage.span}.", *(f"{kind}.{stage.last_block}." for kind in ("objective", "precision")))
        wanted = stage.state().keys()
        found = self.tensors(lambda name: _belongs(name, wanted, prefixes))
        missing = stage.load_state(found)
        if missing:
            logger.warning(
                "s%d/%d: %s has nothing for %s; it starts from its start weights",
                stage.index, stage.num_stages, self.folder, ", ".join(missing),
            )  # fmt: skip
        prefix = f"metrics.{stage.span}."
        metrics.load_state({k.removeprefix(prefix): tensor for k, tensor in found.items() if k.startswith(prefix)})

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those whose names are wanted, from whichever files hold them.

        Raises:
            ConfigError: a file is no safetensors file.
        """
        found: dict[str, Tensor] = {}
        for file in sorted(self.files):
            found.update(_read_tensors(self.folder / file, wanted))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For workers, who need not verify the files again."""
        return {
            "folder": str(self.folder), "step": self.step, "files": dict(self.files), "updates": dict(self.updates),
        }  # fmt: skip

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Checkpoint | None:
        """The inverse of `to_dict`; None of an empty mapping."""
        if not values:
            return None
        return Checkpoint(Path(values["folder"]), values["step"], values["files"], values.get("updates", {}))


def newest_complete(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is complete and undamaged; a damaged one is skipped with a warning."""
    for folder in sorted((run / "checkpoints").glob("step-*"), key=_step_of, reverse=True):
        if not (folder / MANIFEST).exists():
            continue  # some stage had not saved it yet when the run ended
        try:
            return Checkpoint.read(folder)
        except ConfigError as error:
            logger.warning("%s; taking the one before", error)
    return None


def write_manifest(folder: Path, step: int, files: Mapping[str, str], updates: Mapping[str, int]) -> None:
    """The list that makes a checkpoint complete: the SHA-256 of every stage's file, and `Checkpoint.updates`."""
    content = {"format": _FORMAT, "step": step, "files": dict(sorted(files.items())), "updates": dict(updates)}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2).encode())


def drop_after(run: Path, step: int) -> None:
    """Remove checkpoints of steps that a run which goes on from `step` will take again, and half-written files."""
    for folder in (run / "checkpoints").glob("step-*"):
        if _step_of(folder) > step:
            _remove(folder)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=_step_of, reverse=True)
    complete = [folder for folder in folders if (folder / MANIFEST).exists()]
    if len(complete) < keep:
        return
    for folder in folders:
        if _step_of(folder) < _step_of(complete[keep - 1]):
            _remove(folder)


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


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def _remove(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed one is not complete
    shutil.rmtree(folder, ignore_errors=True)


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _by_stage(updates: Mapping[str, int]) -> str:
    """`a run whose stages have taken 8 (from stem), 3 (from layer2.0)`."""
    if not updates:
        return "a parallel run"
    return f"a run whose stages have taken {', '.join(f'{count} (from {name})' for name, count in updates.items())}"


def _verify(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if path.parent != folder or not path.is_file():
        raise ConfigError(f"checkpoint {folder}: {name} is missing")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != digest:
        raise ConfigError(f"checkpoint {folder}: {name} is damaged (SHA-256 {got[:12]}.., expected {digest[:12]}..)")


def _read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of a file; only tensors are read, whatever else it may hold.

    Raises:
        ConfigError: it is no safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in list(tensors.keys()) if wanted(name)}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"checkpoint {path.parent}: {path.name} is no safetensors file ({error})") from error


def _belongs(name: str, wanted: Set[str], prefixes: tuple[str, ...]) -> bool:
    """Whether a stage wants a tensor: by its own name, by its parameter's (optimizer state), or by a prefix."""
    parameter = name.removeprefix("optimizer.").rpartition(".")[0]
    return name in wanted or name.startswith(prefixes) or (name.startswith("optimizer.") and parameter in wanted)
