"""A plan from its file to a training: what it predicts, what it refuses, and the cuts that a run then has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import config_hash, dump, load
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.start import describe
from pipetrgl.studies import planning
from pipetrgl.studies.costs import Cost, LinkSpeed, UnitCost
from pipetrgl.studies.planner import Terms
from pipetrgl.studies.profile import Profile
from tests.equivalence.runs import run
from tests.test_cli import pipetrgl

SMALL = (
    "data: {name: synthetic, shape: [3, 8, 8], samples: 40, valid_fraction: 0.0}\n"
    "model: {name: mlp, depth: 5, width: 8, head: {name: pool_linear}}\n"
    "train: {epochs: 1, batch: 8}\nevaluate: {valid_every: 0, test_at_end: false}\n"
    "run: {report: false}\nlauncher: {name: serial}\n"
)


def by_hand(num_units: int, prefix: str = "block") -> planning.Plan:
    """Units of 1 + 2 s that hand on 8 bytes, two workers, a link of 1 s + 1 s for 4 bytes; heads cost nothing."""
    cost = Cost(forward_s=1.0, backward_s=2.0)
    units = tuple(UnitCost((f"{prefix}{i}",), cost, cost, Cost(), 8, 8, 8) for i in range(num_units))
    return planning.make_plan(Profile("net", 16, units, 1.0), Terms(2, LinkSpeed(1.0, 4.0)))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    return path


def write_plan(config: Path, cuts: Any = (3, 2), **changes: Any) -> None:
    blueprint = draw_up(load(config, ["pipeline.stages=1"]), describe(load(config)))
    blocks = [block.name for block in blueprint.network.blocks]
    content: dict[str, Any] = {"schema": 1, "command": "plan", "model": "mlp-5", "blocks": blocks, "cuts": cuts}
    content["stages"] = [{"replicas": 1}] * 2
    (config.parent / "plan.json").write_text(json.dumps(content | changes))


def test_a_plan_predicts_what_one_counts_by_hand() -> None:
    #  5 units of 3 s: 3 | 2, stages of 9 and 6 s, link 1 + 8 / 4 = 3 s, 16 rows every 9 s; one worker alone: 15 s
    plan = by_hand(5)
    assert sorted(plan.cuts) == [2, 3]
    assert (plan.images_per_s, plan.imbalance, plan.limit) == (16 / 9, 9 / 7.5, "compute")
    assert plan.speed_up == 15 / 9
    assert plan.link_times() == [3.0, 0.0]
    assert "expected 1.8 images/s, 1.67 times one worker; imbalance 1.200;" in planning.summary(plan)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(planning.to_dict(by_hand(3), {"host": "here"})))
    assert planning.read(path) == by_hand(3)


def test_a_profile_from_a_busy_machine_is_no_secret() -> None:
    plan = by_hand(2)
    busy = planning.make_plan(Profile("net", 16, plan.profile.units, 0.5), plan.terms)
    assert "warning" not in planning.summary(plan)
    assert "warning: others kept this machine busy, the profile got 50 % of a processor" in planning.summary(busy)


def test_training_takes_cuts_and_stages_of_its_plan_and_the_run_folder_keeps_them(config: Path) -> None:
    write_plan(config, stages=[{"replicas": 1}, {"replicas": 2}])
    config.write_text(SMALL + "plan: plan.json\n")
    settings = load(config, [f"run.folder={config.parent}"])
    assert (settings.model.cuts, settings.pipeline.stages, settings.pipeline.replicas) == ([3, 2], 2, [1, 2])
    folder = run(settings)
    (config.parent / "plan.json").unlink()
    again = load(folder / "config.yaml")
    assert (again.model.cuts, again.pipeline.stages, again.plan) == ([3, 2], 2, None)
    assert config_hash(again) == config_hash(settings)
    assert "plan" not in dump(settings)


@pytest.mark.parametrize("key", ["model.cuts=[1, 4]", "pipeline.stages=3", "pipeline.replicas=2"])
def test_cuts_or_stages_beside_a_plan_are_an_error(config: Path, key: str) -> None:
    write_plan(config)
    with pytest.raises(
        ConfigError, match=rf"override   {key.split('=')[0]}: the plan sets it \(.*plan.json\); remove it"
    ):
        load(config, [f"plan={config.parent / 'plan.json'}", key])


def test_a_plan_for_another_network_is_refused(config: Path) -> None:
    write_plan(config)
    settings = load(config, [f"plan={config.parent / 'plan.json'}", "model.depth=6"])
    with pytest.raises(ConfigError, match="plan: made for mlp-5 of 6 blocks, but this is mlp-6 of 7; run"):
        draw_up(settings, describe(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "is no plan of `pipetrgl plan` with schema 1"),
        ({"cuts": [3, 0]}, "has a stage without blocks"),
        ({"cuts": None}, "is no plan of `pipetrgl plan`: TypeError"),
        ({"stages": [{"replicas": 2}]}, r"has 2 stages, but replicas \[2\]"),
        ({"stages": [{"replicas": 2}, {"replicas": 0}]}, r"has 2 stages, but replicas \[2, 0\]"),
    ],
)
def test_a_file_that_training_cannot_follow_says_why(config: Path, changes: dict[str, Any], message: str) -> None:
    write_plan(config, **changes)
    config.write_text(SMALL + "\nplan: plan.json\n")
    with pytest.raises(ConfigError, match=rf"1 problem in .*\n  line \d+   plan: .*{message}"):
        load(config)


def test_a_plan_on_the_command_line_wins_over_the_cuts_of_the_file(config: Path) -> None:
    write_plan(config)
    config.write_text(SMALL + "pipeline: {stages: 3}\n")
    assert load(config).pipeline.stages == 3
    settings = load(config, [f"plan={config.parent / 'plan.json'}"])
    assert (settings.model.cuts, settings.pipeline.stages) == ([3, 2], 2)


def test_auto_plans_in_place_for_as_many_workers_as_are_written(config: Path) -> None:
    said: list[str] = []
    settings = planning.planned(load(config, ["model.cuts=auto", "pipeline.stages=2"]), said.append)
    assert isinstance(settings.model.cuts, list)
    assert sum(settings.model.cuts) == 5
    assert sum(settings.pipeline.replica_counts) <= 2
    assert "2 workers, model.cuts" in said[0]
    assert planning.planned(settings, said.append) is settings
    done = pipetrgl(config.parent, "train", "config.yaml", "model.cuts=auto", "pipeline.stages=2", "run.report=false")
    assert done.returncode == 0, done.stderr
    assert "expected" in done.stdout


def test_auto_that_finds_what_the_rest_of_the_config_cannot_use_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "plan_for", lambda *args, **more: by_hand(5))
    settings = load(config, ["model.cuts=auto", "pipeline.stages=3", "objective.transport.tau=[1.0, 1.0, 1.0]"])
    message = (
        r"model.cuts: auto found cuts \[\d, \d\] with replicas \[1, 1\], which do not go with the rest of the config; "
        r"write model.cuts, or change\n  objective.transport.tau: 3 given; pipeline.stages = 2 needs one a stage"
    )
    with pytest.raises(ConfigError, match=message):
        planning.planned(settings, print)


def test_auto_does_not_go_with_a_run_that_must_be_found_again(config: Path) -> None:
    with pytest.raises(ConfigError, match="model.cuts: auto may find other cuts each time, so checkpoint.resume: auto"):
        load(config, ["model.cuts=auto", "checkpoint.resume=auto"])


def test_a_plan_that_is_missing_or_torn_says_so(config: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; `pipetrgl plan CONFIG --workers N` writes one"):
        load(config, ["plan=nothing.json"])
    (config.parent / "plan.json").write_text('{"schema": ')
    with pytest.raises(ConfigError, match="cannot be read"):
        load(config, [f"plan={config.parent / 'plan.json'}"])


def test_the_command_writes_a_plan_that_validate_and_train_follow(config: Path) -> None:
    done = pipetrgl(config.parent, "plan", "config.yaml", "--workers", "2", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "stage  blocks" in done.stdout and "expected" in done.stdout
    plan = json.loads((config.parent / "plan.json").read_text())
    shown = pipetrgl(config.parent, "validate", "config.yaml", "plan=plan.json")
    assert shown.stdout.count("\nstage ") == plan["num_stages"] <= 2


def test_emulated_stages_take_the_times_of_the_plan(config: Path) -> None:
    stages = [{"forward_s": k + 1.0, "backward_s": 2.0, "update_s": 0.5, "replicas": 1} for k in range(2)]
    write_plan(config, stages=stages, rows=16, terms={"accumulate": 2})
    plan = f"plan={config.parent / 'plan.json'}"
    emulated = load(config, [plan, "pipeline.device=emulated"]).pipeline.emulated
    # an update of two micro-batches: a plan says each one's share
    assert (emulated.forward_s, emulated.backward_s, emulated.update_s) == ([1.0, 2.0], [2.0, 2.0], [1.0, 1.0])
    assert emulated.rows == 16
    assert load(config, [plan]).pipeline.emulated.forward_s is None  # a real stage takes what it takes
    with pytest.raises(ConfigError, match=r"pipeline.emulated.rows: the plan sets it \(.*plan.json\); remove it"):
        load(config, [plan, "pipeline.device=emulated", "pipeline.emulated.rows=8"])


def test_a_plan_without_times_cannot_be_emulated(config: Path) -> None:
    write_plan(config)
    with pytest.raises(ConfigError, match="plan: '.*plan.json' has no times of its stages: KeyError"):
        load(config, [f"plan={config.parent / 'plan.json'}", "pipeline.device=emulated"])
