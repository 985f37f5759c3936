"""A study: paired, resumable, choosing on validation only, and honest about what it shows."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import Config
from pipetrgl.config.study import Arm, Study, load_study
from pipetrgl.data.order import epoch_order
from pipetrgl.errors import ConfigError, LaunchError, StoppedError
from pipetrgl.launchers.folder import claimed
from pipetrgl.launchers.scoring import checkpoint_of, score
from pipetrgl.launchers.start import describe, train
from pipetrgl.studies.study import choose, run_study
from pipetrgl.studies.study_report import findings, write_answer
from pipetrgl.studies.study_results import Comparison, compare, summarise, to_csv
from pipetrgl.studies.trials import Outcome, Trial, plan_trials, read_outcome
from pipetrgl.worker import build_stage

BASE = """
config:
  data: {name: synthetic, shape: [3, 8, 8], samples: 136, num_classes: 4}
  model: {name: mlp, depth: 2, width: 8, head: {name: pool_linear}}
  pipeline: {stages: 2}
  train: {epochs: 2, batch: 8}
  optim: {lr: 0.05}
"""
TWO = "seeds: 2\nvariants:\n  vangl: {objective.name: vangl}\n  inf: {objective.transport.tau: .inf}\n"


def study_of(folder: Path, text: str) -> Study:
    path = folder / "s.yaml"
    path.write_text(BASE + text)
    return load_study(path)


def quiet(line: str) -> None:
    pass


def run(study: Study, folder: Path) -> list[Outcome]:
    return run_study(study, folder, quiet, threading.Event())[0]


def run_folders(folder: Path) -> list[str]:
    """Every training that was ever started."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob("runs/**/env.json"))


def started(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def outcome(
    variant: str, seed: int, valid: list[float], test: list[float], case: str = "", candidate: str = "", head: int = 0
) -> Outcome:
    stages: list[dict[str, Any]] = [
        {
            "stage": k,
            "valid_accuracy": v,
            "test_accuracy": t,
            "transport_cost_by_block": {f"b{k}": 1.0 + seed},
            "tau": 1.0,
        }
        for k, (v, t) in enumerate(zip(valid, test, strict=True))
    ]
    trial = Trial(Arm(case, variant, candidate, Config()), seed, Config(), Path(), len(valid), len(valid))
    return Outcome(trial, None, Path("r"), 10, 1, head, tuple(stages), {"config_hash": "h"})


def hand_made(num_seeds: int = 3) -> Study:
    return Study("hand", ("",), ("a", "b"), ("a",), tuple(range(num_seeds)), 1, ())


def test_one_study_end_to_end_through_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"{BASE}{TWO}jobs: 2\n")
    command = [sys.executable, "-m", "pipetrgl", "study", "s.yaml", "--out", "answer"]
    with started(command, tmp_path) as process:
        out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert "4 trainings, 0 of them done before" in out
    # tau = inf is VanGL, bit for bit: nothing but equal pairs proves that data order and start weights are paired
    assert "inf against vangl, best head: +0.00 points (+0.00 to +0.00, 2 paired seeds): equal with every seed." in out
    folder = tmp_path / "answer"
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"], row["stage"]) for row in rows] == [
        (variant, seed, stage) for seed in "01" for variant in ("vangl", "inf") for stage in "01"
    ]
    assert all(row["test_accuracy"] and row["chosen"] == "True" for row in rows)
    assert {row["tau"] for row in rows} == {"", "inf"}
    result = json.loads((folder / "result.json").read_text())
    assert (result["command"], result["name"], result["num_runs"]) == ("study", "s", 4)
    assert [one["holds_zero"] for one in result["comparisons"]] == [True, True]
    page = (folder / "report.html").read_text()
    assert "No difference is shown: all 2 intervals hold 0." in page
    assert {path.stem for path in (folder / "plots").iterdir()} == {"differences_vangl", "accuracy", "transport"}
    # no training has seen the test split
    for metrics in folder.glob("runs/**/metrics.jsonl"):
        assert "test" not in {json.loads(line)["kind"] for line in metrics.read_text().splitlines()}


def test_end_to_end_is_a_variant_whose_only_head_is_the_last(tmp_path: Path) -> None:
    variants = "  whole: {train.order: end_to_end, objective.name: vangl, launcher.name: serial}\n"
    variants += "  one: {pipeline.stages: 1, objective.name: vangl}\n"
    study = study_of(tmp_path, f"seeds: 2\nvariants:\n{variants}")
    outcomes, chosen = run_study(study, tmp_path / "out", quiet, threading.Event())
    summaries = whole, one = summarise(study, outcomes, chosen)
    assert len(whole.test_by_stage) == len(one.test_by_stage) == 1
    # two stages that share one loss are one stage, bit for bit
    assert {answer.verdict for answer in compare(study, summaries)} == {"equal with every seed"}
    write_answer(study, outcomes, chosen, tmp_path / "out")


def test_variants_share_start_weights_and_order_with_one_seed_only(tmp_path: Path) -> None:
    more = "  deep: {pipeline.stages: 1, optim.lr: 0.1}\n"
    trials = plan_trials(study_of(tmp_path, TWO + more), tmp_path / "out")
    assert [(trial.seed, trial.arm.variant) for trial in trials] == [
        (seed, variant) for seed in (0, 1) for variant in ("vangl", "inf", "deep")
    ]

    def weights(trial: Trial) -> dict[str, torch.Tensor]:
        blueprint = draw_up(trial.config, describe(trial.config))
        cpu = torch.device("cpu")
        state: dict[str, torch.Tensor] = {}
        for index in range(blueprint.num_stages):
            state |= build_stage(blueprint, index, cpu).state()
        return {name: tensor for name, tensor in state.items() if "weight" in name and tensor.dim() > 1}

    first, second, deep, other = (weights(trials[k]) for k in (0, 1, 2, 3))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    shared = first.keys() & deep.keys()  # a network in one stage lacks the first of two heads
    assert len(shared) == len(first) - 1
    assert all(first[name].equal(deep[name]) for name in shared)
    assert not any(first[name].equal(other[name]) for name in first)
    assert epoch_order(0, 3, 20).tolist() != epoch_order(1, 3, 20).tolist()


def test_a_study_that_was_stopped_goes_on_and_trains_nothing_twice(tmp_path: Path) -> None:
    one_seed = TWO.replace("seeds: 2", "seeds: 1")
    study, folder, stop = study_of(tmp_path, one_seed), tmp_path / "out", threading.Event()

    def stop_after_first(line: str) -> None:
        if line.startswith("1/2 "):
            stop.set()

    with pytest.raises(StoppedError, match="the same command goes on"):
        run_study(study, folder, stop_after_first, stop)
    (first,) = folder.glob("runs/**/result.json")
    before = first.read_bytes()
    lines: list[str] = []
    outcomes, _ = run_study(study, folder, lines.append, threading.Event())
    assert lines[0] == "2 trainings, 1 of them done before"
    assert len(run_folders(folder)) == 2
    assert first.read_bytes() == before
    tests = [line for line in lines if line.startswith("test split")]
    assert len(tests) == 2
    # a third time there is nothing to do: nothing is trained, nor is the test split read again
    lines.clear()
    again, chosen = run_study(study, folder, lines.append, threading.Event())
    assert lines == ["2 trainings, 2 of them done before"]
    assert to_csv(study, again, chosen) == to_csv(study, outcomes, chosen)
    # one seed more trains only that one
    run_study(study_of(tmp_path, TWO), folder, lines.append, threading.Event())
    assert lines[1] == "4 trainings, 2 of them done before"


def test_a_killed_study_takes_its_trainings_along_and_they_go_on(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE.replace("epochs: 2", "epochs: 400") + TWO.replace("seeds: 2", "seeds: 1"))
    process = started([sys.executable, "-m", "pipetrgl", "study", "s.yaml", "--out", "out"], tmp_path)
    with process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/runs/**/manifest.json")):
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        process.kill()
    (run_folder,) = tmp_path.glob("out/runs/vangl/seed-0-*")
    while not (run_folder / "result.json").exists():  # its training saves, and writes why it ended
        assert time.monotonic() < deadline, (run_folder.parent / "seed-0.log").read_text()
        time.sleep(0.05)
    result = json.loads((run_folder / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["error"].startswith("stopped after step ")  # and not at once: with a checkpoint
    with claimed(run_folder):  # nobody is at work there any more
        pass


def test_ending_a_study_leaves_no_process_and_says_that_it_can_go_on(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE.replace("epochs: 2", "epochs: 4000") + TWO + "jobs: 2\n")
    process = started([sys.executable, "-m", "pipetrgl", "study", "s.yaml", "--out", "out"], tmp_path)
    with process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/runs/*/*/checkpoints"))) < 2:
            assert time.monotonic() < deadline, "the trainings did not start"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/runs/**/result.json")]
    assert [result["status"] for result in results] == ["interrupted"] * 2


def test_only_the_chosen_candidate_meets_the_test_split(tmp_path: Path) -> None:
    # a learning rate of 1e-9 learns nothing
    text = "seeds: 1\nvariants:\n  a: {choose: {optim.lr: [1.0e-9, 0.05]}}\n"
    outcomes, chosen = run_study(study_of(tmp_path, text), tmp_path / "out", quiet, threading.Event())
    assert chosen == {"a": "lr=0.05"}
    bad, good = outcomes
    assert bad.best_valid < good.best_valid
    assert [stage["test_accuracy"] for stage in bad.stages] == [None, None]
    assert json.loads((bad.run / "choice.json").read_text())["test"] is None
    assert None not in [stage["test_accuracy"] for stage in good.stages]
    # what was tested is what was validated: the checkpoint of the chosen step, and no other is kept
    again = score(good.run, checkpoint_of(good.run, good.step), "valid")
    assert [one.accuracy for one in again] == [stage["valid_accuracy"] for stage in good.stages]
    assert [path.name for path in (good.run / "checkpoints").iterdir()] == [f"step-{good.step}"]
    (summary,) = summarise(study_of(tmp_path, text), outcomes, chosen)
    assert summary.candidate == "lr=0.05"
    assert list(summary.candidates) == ["lr=1e-09", "lr=0.05"]


@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_one_stage_at_a_time_is_chosen_among_steps_that_reach_all_heads(tmp_path: Path, order: str) -> None:
    # 16 steps an epoch, two epochs a stage: only from step 48 on has the second stage learned
    study = study_of(tmp_path, f"seeds: 1\nvariants:\n  a: {{train.order: {order}}}\n")
    (trial,) = plan_trials(study, tmp_path / "out")
    train(trial.config, lambda blueprint, folder: lambda row: None)
    found = read_outcome(trial)
    assert found.step in (48, 64)
    assert found.epoch == found.step // 16
    again = score(found.run, checkpoint_of(found.run, found.step), "valid")
    assert [one.accuracy for one in again] == [stage["valid_accuracy"] for stage in found.stages]


def test_the_step_is_that_of_the_best_mean_over_heads(tmp_path: Path) -> None:
    (trial,) = plan_trials(study_of(tmp_path, "seeds: 1\nvariants: {a: }\n"), tmp_path / "out")
    result = train(trial.config, lambda blueprint, folder: lambda row: None)
    assert result is not None
    path = Path(result["run"]) / "metrics.jsonl"
    # as if the first epoch had the best single head, and the second one the best mean: 0.50 against 0.55
    accuracies = {(16, 0): 0.9, (16, 1): 0.1, (32, 0): 0.5, (32, 1): 0.6}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "valid":
            row["accuracy"] = accuracies[row["step"], row["stage"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_outcome(trial)
    assert (found.step, found.epoch, found.head, found.best_valid) == (32, 2, 1, 0.6)


def test_a_variant_that_diverges_is_named_and_compared_with_nothing(tmp_path: Path) -> None:
    text = "seeds: 1\nvariants:\n  a: \n  b: {optim.lr: 1.0e+30}\n"
    study, folder = study_of(tmp_path, text), tmp_path / "out"
    lines: list[str] = []
    outcomes, chosen = run_study(study, folder, lines.append, threading.Event())
    assert any(line.startswith("2/2 b seed 0: diverged (") for line in lines)
    assert list(chosen) == ["a"]
    assert "b diverged with seed 0: it is compared with nothing." in write_answer(study, outcomes, chosen, folder)
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    assert [row["status"] for row in rows] == ["done", "done", "diverged"]
    run_study(study, folder, lines.append, threading.Event())
    assert lines[-1] == "2 trainings, 2 of them done before"


def test_a_failing_training_ends_the_study_with_its_own_error(tmp_path: Path) -> None:
    text = TWO + "  c: {launcher.faults: [{stage: 1, step: 2, action: raise}]}\njobs: 3\n"
    with pytest.raises(LaunchError, match=r"^c seed 0: .*step 2") as caught:
        run(study_of(tmp_path, text.replace("seeds: 2", "seeds: 1")), tmp_path / "out")
    assert "seed-0.log" in str(caught.value)


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study, folder = study_of(tmp_path, TWO.replace("seeds: 2", "seeds: 1")), tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="exists and is no study's folder; name another with --out"):
        run(study, folder)
    (folder / "thesis.tex").unlink()
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        run_study(study, folder, quiet, stop)
    path = tmp_path / "s.yaml"
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(ConfigError, match="another study 's', whose vangl seed 0 had train.epochs: 2, and now has 3"):
        run(load_study(path), folder)
    with pytest.raises(ConfigError, match="holds the study 's', and this is 'other'"):
        run(study_of(tmp_path, TWO + "name: other\n"), folder)
    with claimed(folder), pytest.raises(LaunchError, match="in use by process .* folder of its own with --out"):
        run(study, folder)


def test_what_cannot_be_trained_is_told_for_all_variants_before_anything_is(tmp_path: Path) -> None:
    text = "seeds: 1\nvariants:\n  a: \n  b: {pipeline.stages: 60}\n  c: {model.head.name: tokens}\n"
    with pytest.raises(ConfigError, match=r"(?s)  b: .*60 stages need .*\n  c: .*tokens"):
        run(study_of(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differences_are_paired_by_seed() -> None:
    # a: 50 60 70, b: 51 62 73 %: the differences 1 2 3 have s = 1, whatever the spread between seeds
    outcomes = [
        *(outcome("a", seed, [0.5], [(50 + 10 * seed) / 100]) for seed in range(3)),
        *(outcome("b", seed, [0.5], [(51 + 11 * seed) / 100]) for seed in range(3)),
    ]
    study = hand_made()
    best, last = compare(study, summarise(study, outcomes, {"a": "", "b": ""}))
    assert (best.head, last.head) == ("best", "last")
    assert list(best.differences) == [0, 1, 2]
    assert best.interval.mean == pytest.approx(0.02)
    assert best.interval.half == pytest.approx(0.024841, abs=1e-6)
    assert best.sentence == (
        "b against a, best head: +2.00 points (-0.48 to +4.48, 3 paired seeds): the interval holds 0, "
        "no difference is shown."
    )


def test_a_loss_is_called_a_loss() -> None:
    outcomes = [
        outcome(name, seed, [0.5], [0.5 - loss]) for seed in range(3) for name, loss in (("a", 0.0), ("b", 0.01))
    ]
    study = hand_made()
    best, _ = compare(study, summarise(study, outcomes, {"a": "", "b": ""}))
    assert best.verdict == "worse"


def test_the_best_head_is_validations_and_the_last_head_is_shown_beside_it() -> None:
    # on the test split the second head would be better, but validation has chosen the first
    one = outcome("a", 0, [0.9, 0.8, 0.7], [0.5, 0.6, 0.4], head=0)
    study = hand_made(1)
    summary = summarise(study, [one, outcome("b", 0, [0.5] * 3, [0.5] * 3)], {"a": "", "b": ""})[0]
    assert summary.best is not None and summary.last is not None and summary.stagnation is not None
    assert (summary.best.mean, summary.last.mean) == (0.5, 0.4)
    assert summary.stagnation.mean == pytest.approx(0.2)
    assert [value.mean for value in summary.test_by_stage] == [0.5, 0.6, 0.4]
    assert summary.best.half is None
    comparison = compare(study, summarise(study, [one, outcome("b", 0, [0.5] * 3, [0.5] * 3)], {"a": "", "b": ""}))[0]
    assert comparison.verdict == "a single seed says nothing about chance"


def test_the_candidate_is_chosen_by_the_mean_over_seeds_and_one_that_diverges_is_out() -> None:
    outcomes = [
        *(outcome("a", seed, [valid], [0.0], candidate="x") for seed, valid in enumerate((0.9, 0.5))),
        *(outcome("a", seed, [valid], [0.0], candidate="y") for seed, valid in enumerate((0.8, 0.7))),
        outcome("a", 0, [1.0], [0.0], candidate="z"),
        Outcome(Trial(Arm("", "a", "z", Config()), 1, Config(), Path(), 1, 1), "a loss is NaN"),
    ]
    assert choose(outcomes) == {"a": "y"}  # 0.75 against 0.70


def test_baselines_are_those_of_the_case_or_of_a_named_one_and_no_pair_comes_twice() -> None:
    study = Study("hand", ("k1", "k2"), ("a", "b"), ("a", "k1/a"), (0,), 1, ())
    outcomes = [outcome(variant, 0, [0.5], [0.5], case=case) for case in ("k1", "k2") for variant in ("a", "b")]
    summaries = summarise(study, outcomes, dict.fromkeys(("k1/a", "k1/b", "k2/a", "k2/b"), ""))
    pairs = [(one.place, one.baseline) for one in compare(study, summaries) if one.head == "best"]
    assert pairs == [("k1/b", "k1/a"), ("k2/b", "k2/a"), ("k2/a", "k1/a"), ("k2/b", "k1/a")]
    assert len(findings(summaries, compare(study, summaries))) == 8


def test_transport_cost_by_block_is_the_mean_over_seeds() -> None:
    outcomes = [outcome(name, seed, [0.5, 0.5], [0.5, 0.5]) for seed in (0, 1, 2) for name in "ab"]
    summary = summarise(hand_made(), outcomes, {"a": "", "b": ""})[0]
    assert summary.cost_by_block == {"b0": 2.0, "b1": 2.0}  # of 1, 2 and 3


def test_a_comparison_without_any_difference_says_so() -> None:
    study = hand_made()
    outcomes = [outcome(name, seed, [0.5], [0.5]) for seed in range(3) for name in "ab"]
    found: list[Comparison] = compare(study, summarise(study, outcomes, {"a": "", "b": ""}))
    assert {one.verdict for one in found} == {"equal with every seed"}
