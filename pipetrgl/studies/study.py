"""A study from its file to its answer: trains what is missing, chooses on validation, reads the test split once.

    study file -> trials (arm x seed) -> choice of step and head -> choice of candidate -> test -> results.csv, report
                  each an ordinary       by each trial's own       by the mean over       of the chosen
                  training               validation                seeds                  candidates only

Everything is found again in the folder, so the same command goes on where it was ended.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.load import config_hash, dump, undump
from pipetrgl.config.schema import CheckpointConfig, Config
from pipetrgl.config.study import Arm, Study
from pipetrgl.data.dataset import DataSpec
from pipetrgl.engine.checkpoint import MANIFEST, step_folder, write_atomically
from pipetrgl.errors import ConfigError, StoppedError
from pipetrgl.launchers.folder import claimed
from pipetrgl.launchers.scoring import score
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.trainings import Training, last_words, run_all
from pipetrgl.studies import plots
from pipetrgl.studies.report import read_run

Say = Callable[[str], None]
_RECORD = "study.json"
_CHOICE = "choice.json"
_KEEP_ALL = 10**6  # checkpoints of a training, until one of them is chosen


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Attributes:
        config: as it is trained.
        folder: of its config, its log and its run folder.
        num_stages: K.
    """

    arm: Arm
    seed: int
    config: Config
    folder: Path
    num_stages: int

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
            `test_accuracy` and `test_loss` until the test.
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


def run_study(study: Study, folder: Path, say: Say, stop: threading.Event) -> tuple[list[Outcome], dict[str, str]]:
    """Train, choose, and test; goes on with what the folder holds.

    Args:
        say: told of progress, a line at a time.
        stop: once set, trainings save and end.
    Returns:
        The outcome of every trial, and the chosen candidate of each `case/variant`; a variant all of whose candidates
        diverged is not there.
    Raises:
        ConfigError: a variant that cannot be trained, or the folder is of another study.
        StoppedError: `stop` was set.
        LaunchError: a training failed, and not by diverging.
    """
    trials = plan_trials(study, folder)
    _require_own(study, folder, trials)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{folder}': {error.strerror}") from error
    with claimed(folder, "or give this study a folder of its own with --out"):
        _write_record(study, folder, trials)
        _train(trials, study.jobs, say, stop)
        outcomes = [_outcome(trial) for trial in trials]
        chosen = choose(outcomes)
        return [_tested(outcome, chosen, say, stop) for outcome in outcomes], chosen


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
    return Trial(arm, seed, config.model_copy(update=changes), place, blueprint.num_stages)


def choose(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The candidate of each `case/variant` with the best validation accuracy, the mean over seeds of each trial's best
    head; the first of equals. A candidate that diverged with any seed is out.
    """
    by_arm: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        arm = outcome.trial.arm
        by_arm.setdefault((arm.case, arm.variant, arm.candidate), []).append(outcome)
    best: dict[str, tuple[float, str]] = {}
    for (case, variant, candidate), some in by_arm.items():
        if any(outcome.error for outcome in some):
            continue
        mean = statistics.fmean(outcome.best_valid for outcome in some)
        place = pair_of(case, variant)
        if place not in best or mean > best[place][0]:
            best[place] = mean, candidate
    return {place: candidate for place, (_, candidate) in best.items()}


def pair_of(case: str, variant: str) -> str:
    """`case/variant`, or the variant alone where a study has no cases."""
    return f"{case}/{variant}" if case else variant


def _require_own(study: Study, folder: Path, trials: Sequence[Trial]) -> None:
    """Raises:
    ConfigError: the folder holds something else, or trials of the same names with other configs.
    """
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {".lock"}):
        return
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        name, hashes = record["study"], record["trials"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} exists and is no study's folder; name another with --out") from error
    if name != study.name:
        raise ConfigError(f"{folder} holds the study {name!r}, and this is {study.name!r}; name another with --out")
    changed = [trial for trial in trials if hashes.get(trial.name, "") not in ("", config_hash(trial.config))]
    if changed:
        raise ConfigError(
            f"{folder} holds another study {name!r}, whose {changed[0].name} "
            f"{_difference(changed[0])}; name another folder with --out, or remove it"
        )


def _difference(trial: Trial) -> str:
    """`had train.epochs: 2, and now has 3`, from the config that the folder holds."""
    try:
        before = _flat(undump(trial.training.config.read_text(encoding="utf-8")).model_dump())
    except (OSError, ValueError):
        return "had another config"
    after = _flat(trial.config.model_dump())
    aside = ("run.", "checkpoint.", "launcher.", "metrics.", "trace.", "plan")
    keys = [key for key in after if before.get(key) != after[key] and not key.startswith(aside)]
    return (
        "; ".join(f"had {key}: {before.get(key)}, and now has {after[key]}" for key in keys[:3]) or "had other options"
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _write_record(study: Study, folder: Path, trials: Sequence[Trial]) -> None:
    """What the folder belongs to, written before anything is trained; trials of before that are now left out stay."""
    path = folder / _RECORD
    before = json.loads(path.read_text(encoding="utf-8"))["trials"] if path.exists() else {}
    hashes = {trial.name: config_hash(trial.config) for trial in trials}
    record = {"schema": 1, "study": study.name, "trials": {**before, **hashes}}
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def _train(trials: Sequence[Trial], jobs: int, say: Say, stop: threading.Event) -> None:
    """Train what is neither done nor known to diverge; a training that was ended goes on from its last checkpoint."""
    missing = {trial.training: trial for trial in trials if not trial.diverged.exists() and _done(trial) is None}
    say(f"{len(trials)} trainings, {len(trials) - len(missing)} of them done before")
    for training, trial in missing.items():
        write_atomically(training.config, dump(trial.config).encode())
        training.log.unlink(missing_ok=True)
    count = len(trials) - len(missing)

    def ended(training: Training, well: bool, seconds: float) -> None:
        nonlocal count
        count += 1
        trial = missing[training]
        if not well:
            words = last_words(training)
            write_atomically(trial.diverged, json.dumps({"error": words}).encode())
            say(f"{count}/{len(trials)} {trial.name}: diverged ({words})")
            return
        best = _outcome(trial).best_valid
        say(
            f"{count}/{len(trials)} {trial.name}: best head {100 * best:.1f} % of the validation split, {seconds:.0f} s"
        )

    run_all(list(missing), jobs, ended, stop)


def _done(trial: Trial) -> tuple[Path, dict[str, Any]] | None:
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


def _outcome(trial: Trial) -> Outcome:
    """Read a trial that has ended; the first time, choose its step and head, and let all other checkpoints go."""
    if trial.diverged.exists():
        return Outcome(trial, json.loads(trial.diverged.read_text(encoding="utf-8"))["error"])
    done = _done(trial)
    assert done is not None, f"{trial.name} has ended, and its result is not there"
    run, result = done
    rows = read_run(run).rows
    valid = {step: heads for step, heads in plots.evaluations(rows, "valid").items() if len(heads) == trial.num_stages}
    choice = _choice(run, valid)
    step, head = choice["step"], choice["head"]
    at_step = {row["stage"]: row for row in rows if row["kind"] == "valid" and row["step"] == step}
    objective = trial.config.objective
    has_tau = objective.name == "trgl" and not objective.transport.multipliers.enabled
    stages = []
    for stage in result["stages"]:
        own = [row for row in rows if row["kind"] == "train" and row["stage"] == stage["stage"] and row["step"] <= step]
        last = own[-1]  # a row covers the epochs since the validation before it
        test = (choice["test"] or [{}] * trial.num_stages)[stage["stage"]]
        stages.append(
            {
                **stage,
                "tau": stage["tau"] if has_tau else None,
                "valid_accuracy": at_step[stage["stage"]]["accuracy"],
                "valid_loss": at_step[stage["stage"]]["task_loss"],
                "train_accuracy": last["accuracy"],
                **{key: last[key] for key in ("task_loss", "transport_cost", "transport_cost_by_block")},
                "test_accuracy": test.get("accuracy"),
                "test_loss": test.get("loss"),
            }
        )
    return Outcome(trial, None, run, step, at_step[0]["epoch"] + 1, head, tuple(stages), result)


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


def _tested(outcome: Outcome, chosen: Mapping[str, str], say: Say, stop: threading.Event) -> Outcome:
    """The outcome with its test accuracy if its candidate was chosen, which is measured once in a trial's life."""
    arm = outcome.trial.arm
    if outcome.error or chosen.get(pair_of(arm.case, arm.variant)) != arm.candidate:
        return _blind(outcome)
    if outcome.stages[0]["test_accuracy"] is not None:
        return outcome
    if stop.is_set():
        raise StoppedError("stopped; the same command goes on")
    say(f"test split: {outcome.trial.name}, step {outcome.step}")
    scores = score(outcome.run, outcome.step)
    test = [{"accuracy": one.accuracy, "loss": one.loss} for one in scores]
    choice = {"step": outcome.step, "head": outcome.head, "test": test}
    write_atomically(outcome.run / _CHOICE, json.dumps(choice).encode())
    return _outcome(outcome.trial)


def _blind(outcome: Outcome) -> Outcome:
    """Without a test accuracy that an earlier choice, of fewer candidates or seeds, has left in the folder."""
    stages = tuple({**stage, "test_accuracy": None, "test_loss": None} for stage in outcome.stages)
    return dataclasses.replace(outcome, stages=stages)
