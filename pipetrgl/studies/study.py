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
from pathlib import Path
from typing import Any

from pipetrgl.config.load import config_hash, dump, undump
from pipetrgl.config.study import Study
from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.errors import ConfigError, StoppedError
from pipetrgl.launchers.folder import claimed
from pipetrgl.launchers.scoring import checkpoint_of, score
from pipetrgl.launchers.trainings import Training, last_words, run_all
from pipetrgl.studies.trials import Outcome, Trial, finished, note_test, plan_trials, read_outcome

Say = Callable[[str], None]
_RECORD = "study.json"


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
        outcomes = [read_outcome(trial) for trial in trials]
        chosen = choose(outcomes)
        return [_tested(outcome, chosen, say, stop) for outcome in outcomes], chosen


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
    missing = {trial.training: trial for trial in trials if not trial.diverged.exists() and finished(trial) is None}
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
        best = read_outcome(trial).best_valid
        say(
            f"{count}/{len(trials)} {trial.name}: best head {100 * best:.1f} % of the validation split, {seconds:.0f} s"
        )

    run_all(list(missing), jobs, ended, stop)


def _tested(outcome: Outcome, chosen: Mapping[str, str], say: Say, stop: threading.Event) -> Outcome:
    """The outcome with its test accuracy if its candidate was chosen, which is measured once in a trial's life."""
    arm = outcome.trial.arm
    if outcome.error or chosen.get(pair_of(arm.case, arm.variant)) != arm.candidate:
        return _blind(outcome)
    if outcome.stages[outcome.head]["test_accuracy"] is not None:
        return outcome
    if stop.is_set():
        raise StoppedError("stopped; the same command goes on")
    say(f"test split: {outcome.trial.name}, step {outcome.step}")
    scores = score(outcome.run, checkpoint_of(outcome.run, outcome.step))
    test = [{"accuracy": one.accuracy, "loss": one.loss} if one else {} for one in scores]
    note_test(outcome, test)
    return read_outcome(outcome.trial)


def _blind(outcome: Outcome) -> Outcome:
    """Without a test accuracy that an earlier choice, of fewer candidates or seeds, has left in the folder."""
    stages = tuple({**stage, "test_accuracy": None, "test_loss": None} for stage in outcome.stages)
    return dataclasses.replace(outcome, stages=stages)
