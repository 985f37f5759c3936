"""The trainings of a study: each an ordinary run in a folder of its own, and what it gave."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.load import config_hash
from pipetrgl.config.schema import CheckpointConfig, Config
from pipetrgl.config.study import Arm, Study
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import MANIFEST, step_folder, write_atomically
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.trainings import Training
from pipetrgl.studies import plots
from pipetrgl.studies.record import read_run

_CHOICE = "choice.json"
_KEEP_ALL = 10**6  # checkpoints of a training, until one of them is chosen


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Attributes:
        config: as it is trained.
        folder: of its config, its log and its run folder.
        num_stages, num_heads: K, and the stages that have a head.
    """

    arm: Arm
    seed: int
    config: Config
    folder: Path
    num_stages: int
    num_heads: int

    @property
    def name(self) -> str:
        return f"{self.arm.place} seed {self.seed}"

    @property
    def training(self) -> Training:
        return Training(self.name, self.folder / f"seed-{self.seed}.yaml", self.config.train.threads)

    @property
    def diverged(self) -> Path:
        """Where it is noted that the training diverged: with the same config it would do so again."""
        return self.folder / f"seed-{self.seed}.diverged.json"


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        error: why it diverged; then there is nothing else.
        run: the run folder.
        step, epoch, head: chosen on validation; epochs done, from 1.
        stages: of result.json, with the values at the chosen step: `valid_accuracy`, `valid_loss`, `train_accuracy`,
            `task_loss`, `transport_cost`, `transport_cost_by_block`; `tau` is None where the objective has none,
            `test_accuracy` and `test_loss` until the test, and all of them but `tau` for a stage without head.
        result: result.json.
    """

    trial: Trial
    error: str | None = None
    run: Path = Path()
    step: int = 0
    epoch: int = 0
    head: int = 0
    stages: tuple[Mapping[str, Any], ...] = ()
    result: Mapping[str, Any] | None = None

    @property
    def best_valid(self) -> float:
        return float(self.stages[self.head]["valid_accuracy"])

    @property
    def heads(self) -> tuple[Mapping[str, Any], ...]:
        """The stages that have one; end to end, only the last."""
        return tuple(stage for stage in self.stages if stage["valid_accuracy"] is not None)


def plan_trials(study: Study, folder: Path) -> list[Trial]:
    """Every training of a study, seed by seed, so that pairs are complete early.

    Raises:
        ConfigError: of all arms that cannot be trained.
    """
    specs: dict[str, DataSpec] = {}
    blueprints: list[Blueprint] = []
    faults: list[str] = []
    for arm in study.arms:
        try:
            data = arm.config.data.model_dump_json()
            specs[data] = specs.get(data) or describe(arm.config)
            blueprints.append(draw_up(arm.config, specs[data]))
        except ConfigError as error:
            faults.append(f"  {arm.place}: {error}")
    if faults:
        raise ConfigError("\n".join([f"study {study.name} cannot be trained", *dict.fromkeys(faults)]))
    return [
        _trial(arm, seed, blueprint, folder)
        for seed in study.seeds
        for arm, blueprint in zip(study.arms, blueprints, strict=True)
    ]


def _trial(arm: Arm, seed: int, blueprint: Blueprint, folder: Path) -> Trial:
    """The arm's config with what the study sets: seed, folder, checkpoints at each validation, no test."""
    config, place = arm.config, folder.absolute() / "runs" / arm.place
    every = int(config.evaluate.valid_every) * blueprint.itinerary.steps_per_epoch
    launcher = config.launcher
    changes: dict[str, Any] = {
        "seed": seed,
        "evaluate": config.evaluate.model_copy(update={"test_at_end": False}),
        "metrics": config.metrics.model_copy(update={"every": every}),
        "trace": config.trace.model_copy(update={"num_steps": 0}),
        "run": config.run.model_copy(
            update={"name": f"seed-{seed}", "folder": str(place), "report": False, "save_final": True}
        ),
        "checkpoint": CheckpointConfig(every=every, keep=_KEEP_ALL, resume="auto"),
    }
    if "name" not in launcher.model_fields_set:
        changes["launcher"] = launcher.model_copy(update={"name": "serial"})
    num_stages = blueprint.num_stages
    num_heads = sum(map(blueprint.has_head, range(num_stages)))
    return Trial(arm, seed, config.model_copy(update=changes), place, num_stages, num_heads)


def finished(trial: Trial) -> tuple[Path, dict[str, Any]] | None:
    """The finished run of a trial, with its result."""
    digest = config_hash(trial.config)
    for run in sorted(trial.folder.glob(f"seed-{trial.seed}-*/")):
        try:
            result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # ended before it could write one: it goes on
        if result["status"] == "done" and result["config_hash"] == digest:
            return run, result
    return None


def read_outcome(trial: Trial) -> Outcome:
    """Read a trial that has ended; the first time, choose its step and head, and let all other checkpoints go."""
    if trial.diverged.exists():
        return Outcome(trial, json.loads(trial.diverged.read_text(encoding="utf-8"))["error"])
    done = finished(trial)
    assert done is not None, f"{trial.name} has ended, and its result is not there"
    run, result = done
    rows = read_run(run).rows
    valid = {step: heads for step, heads in plots.evaluations(rows, "valid").items() if len(heads) == trial.num_heads}
    choice = _choice(run, valid)
    step, head = choice["step"], choice["head"]
    at_step = {row["stage"]: row for row in rows if row["kind"] == "valid" and row["step"] == step}
    objective = trial.config.objective
    has_tau = objective.name == "trgl" and not objective.transport.multipliers.enabled
    stages = []
    for stage in result["stages"]:
        own = [row for row in rows if row["kind"] == "train" and row["stage"] == stage["stage"] and row["step"] <= step]
        last = own[-1]  # a row covers the epochs since the validation before it
        scored = at_step.get(stage["stage"], {})
        test = (choice["test"] or [{}] * trial.num_stages)[stage["stage"]]
        stages.append(
            {
                **stage,
                "tau": stage["tau"] if has_tau else None,
                "valid_accuracy": scored.get("accuracy"),
                "valid_loss": scored.get("task_loss"),
                "train_accuracy": last["accuracy"],
                **{key: last[key] for key in ("task_loss", "transport_cost", "transport_cost_by_block")},
                "test_accuracy": test.get("accuracy"),
                "test_loss": test.get("loss"),
            }
        )
    return Outcome(trial, None, run, step, at_step[head]["epoch"] + 1, head, tuple(stages), result)


def _choice(run: Path, valid: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    """The step with the best mean validation accuracy of all heads, then the best head there; the later of equals.

    The mean, for the step is the whole network's: one that flatters a single head would be unfair to the others.
    Chosen once, then kept in the run folder.
    """
    path = run / _CHOICE
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    saved = [step for step in valid if (step_folder(run, step) / MANIFEST).exists()]
    if not saved:
        raise ConfigError(f"{run}: no checkpoint of a validated step is left; remove this folder to train it again")
    step = max(saved, key=lambda step: (statistics.fmean(valid[step].values()), step))
    head = max(valid[step], key=lambda stage: (valid[step][stage], stage))
    content = {"step": step, "head": head, "test": None}
    write_atomically(path, json.dumps(content).encode())
    for other in saved:
        if other != step:
            _drop(step_folder(run, other))
    return content


def _drop(checkpoint: Path) -> None:
    for file in (checkpoint / MANIFEST, *checkpoint.iterdir()):  # the manifest first: half a checkpoint is none
        file.unlink(missing_ok=True)
    checkpoint.rmdir()


def note_test(outcome: Outcome, test: Sequence[Mapping[str, float]]) -> None:
    """Keep what the test split gave beside the choice, `accuracy` and `loss` of each head: it is not read again."""
    content = {"step": outcome.step, "head": outcome.head, "test": list(test)}
    write_atomically(outcome.run / _CHOICE, json.dumps(content).encode())
