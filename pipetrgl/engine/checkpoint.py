"""Checkpoints: each stage saves when the closing micro-batch of a chosen step has passed, without a barrier.

    checkpoints/step-752/stage-0.safetensors ... stage-3.safetensors manifest.json

Data flows one way and in order, so the files of one step are a consistent cut: nothing in flight belongs to it. Keys
are names of the network, so another number of stages or other cuts can read them. The manifest comes last and makes
the checkpoint complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
from torch import Tensor

from pipetrgl.channels.contracts import Outbox
from pipetrgl.engine.metrics import Sink, TrainMetrics
from pipetrgl.errors import ConfigError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage, StageOutput

logger = logging.getLogger(__name__)

_FORMAT = 1
MANIFEST = "manifest.json"


@final
@dataclass(frozen=True)
class SaveSchedule:
    """When a stage saves.

    Attributes:
        every: optimizer steps between two checkpoints; 0 for none before the end.
        final: also when the run is done.
        total_steps: of the run; where its stream ends earlier, a checkpoint is always written.
    """

    every: int
    final: bool
    total_steps: int

    def saves_after(self, step: int) -> bool:
        """Whether in mid-stream, when `step` optimizer steps are taken."""
        return self.every > 0 and step % self.every == 0

    def saves_at_end(self, step: int) -> bool:
        """Whether when the stream has ended with `step` optimizer steps taken."""
        return self.final or step < self.total_steps


@final
class SaveCheckpoints:
    """Snapshots the stage at once and writes the snapshot in the background; tells the sink which file holds it.

    A file that cannot be written, on a full disk for example, is a warning: training goes on, and the checkpoint before
    stays the newest complete one.

    Args:
        stage: saved with its optimizer.
        metrics: whose sums since the last row are saved as well, so that a resumed run writes the same rows.
        outbox: of the stage: a checkpoint is durable once the next stage has received all that it covers.
        run: the run folder.
        sink: takes rows of kind "checkpoint" (the file is written), "durable" (a replacement of this stage could start
            from it) and "last" (the stream has ended).
        schedule: when to save.
        first_step: optimizer steps taken before this stream begins.
    """

    def __init__(
        self,
        stage: Stage,
        metrics: TrainMetrics,
        outbox: Outbox,
        run: Path,
        sink: Sink,
        schedule: SaveSchedule,
        first_step: int = 0,
    ) -> None:
        self._stage = stage
        self._metrics = metrics
        self._outbox = outbox
        self._run = run
        self._sink = sink
        self._schedule = schedule
        self._step = first_step  # of the run, also while this stage is idle
        self._saved: int | None = None
        self._index = -1  # of the micro-batch that closed `_step`
        # step of each file that is not known to be durable yet, and index of the micro-batch that closed it
        self._written: deque[tuple[int, int]] = deque()
        self._writer: threading.Thread | None = None

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if micro_batch.split is Split.TRAIN and micro_batch.closes_step:
            self._step, self._index = micro_batch.step + 1, micro_batch.index
            if self._schedule.saves_after(self._step):
                self._save()
        self._announce()

    def close(self) -> None:
        complete = (step_folder(self._run, self._step) / MANIFEST).exists()  # of a run that went on from its last step
        if self._schedule.saves_at_end(self._step) and self._saved != self._step and not complete:
            self._save()
        if self._writer is not None:
            self._writer.join()
        self._announce()
        self._sink({"kind": "last", "stage": self._stage.index, "step": self._step})

    def _announce(self) -> None:
        durable = None
        while self._written and self._written[0][1] <= self._outbox.received_index:
            durable = self._written.popleft()
        if durable is not None:
            step, index = durable
            self._sink({"kind": "durable", "stage": self._stage.index, "step": step, "next_index": index + 1})

    def _save(self) -> None:
        if self._writer is not None:
            self._writer.join()  # at most one snapshot is in memory: a slow disk slows the stage, not its memory
            self._announce()
        step = self._saved = self._step
        # Cloned, also on the CPU: the next step changes the weights in place while the file is being written.
        state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._state().items()}
        self._writer = threading.Thread(
            target=self._write, args=(step, self._index, state), name="checkpoint", daemon=True
        )
        self._writer.start()

    def _state(self) -> dict[str, Tensor]:
        metrics = self._metrics.state()
        return {
            **self._stage.state(),
            **self._stage.optimizer_state(),
            **{f"metrics.{self._stage.span}.{name}": tensor for name, tensor in metrics.items()},
        }

    def _write(self, step: int, index: int, state: dict[str, Tensor]) -> None:
        name = f"stage-{self._stage.index}.safetensors"
        if not all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
            logger.warning(
                "s%d/%d step %d: a weight is not finite, so no checkpoint is written; the one before stays the newest",
                self._stage.index, self._stage.num_stages, step,
            )  # fmt: skip
            return
        try:
            digest = write_atomically(step_folder(self._run, step) / name, safetensors.torch.save(state))
        except OSError as error:
            logger.warning(
                "s%d/%d step %d: the checkpoint could not be written (%s); training goes on",
                self._stage.index, self._stage.num_stages, step, error,
            )  # fmt: skip
            return
        row = {"kind": "checkpoint", "stage": self._stage.index, "step": step, "file": name, "sha256": digest}
        self._sink(row)
        self._written.append((step, index))


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
        prefixes = (f"metrics.{stage.span}.", f"objective.{stage.last_block}.")
        wanted = stage.state().keys()
        found: dict[str, Tensor] = {}
        for file in sorted(self.files):
            found.update(_read_tensors(self.folder / file, lambda name: _belongs(name, wanted, prefixes)))
        missing = stage.load_state(found)
        if missing:
            logger.warning(
                "s%d/%d: %s has nothing for %s; it starts from its start weights",
                stage.index, stage.num_stages, self.folder, ", ".join(missing),
            )  # fmt: skip
        prefix = f"metrics.{stage.span}."
        metrics.load_state({k.removeprefix(prefix): tensor for k, tensor in found.items() if k.startswith(prefix)})

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
