"""The geometry of a stage's map, on values that can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.engine.geometry import measure, monotone_share, relative_cost, straightness
from pipetrgl.launchers.start import describe
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import metrics, run, tiny


def test_straightness_of_equal_crossing_and_opposite_steps() -> None:
    right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert straightness([right, right, right]) == 1  # 9 / (3 * 3)
    assert straightness([right, up]) == 0.5  # 2 / (2 * 2)
    assert straightness([right, -right]) == 0
    assert straightness([right, 3 * right]) == 0.8  # straight, but not at constant speed: 16 / (2 * 10)
    assert straightness([0 * right, 0 * right]) is None


def test_straightness_is_summed_over_runs_of_equal_shapes() -> None:
    right, up, wide = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 3)
    assert straightness([right, up, wide, wide]) == 14 / 16  # 2 / (2 * 2) and 12 / (2 * 6)
    assert straightness([right, up, wide]) == 0.5  # one residual alone has no direction to keep
    assert straightness([right, wide, right]) is None
    assert straightness([]) is None


def test_monotone_share_counts_pairs() -> None:
    #  0 -> 0, 1 -> 3, 2 -> 1: pairs (0, 1) and (0, 2) keep their order, (1, 2) swaps
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [3.0], [1.0]])
    assert monotone_share(x, y) == pytest.approx(2 / 3)
    assert monotone_share(x, x) == 1
    assert monotone_share(x, -x) == 0
    assert monotone_share(x, torch.ones(3, 1)) == 1  # constant: every product is 0
    assert monotone_share(x[:1], y[:1]) is None


def test_monotone_share_is_of_whole_rows() -> None:
    x = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    assert monotone_share(x, torch.tensor([[[0.0, 0.0]], [[2.0, -1.0]]])) == 1  # 2 - 1 >= 0
    assert monotone_share(x, torch.tensor([[[0.0, 0.0]], [[1.0, -2.0]]])) == 0


def test_relative_cost_is_in_units_of_the_input_and_adds_up_a_blocks_residuals() -> None:
    x, ones = torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    assert relative_cost(x, [ones]) == 0.25
    assert relative_cost(x, [ones, 2 * ones]) == 1.25
    assert relative_cost(torch.zeros(1, 2), [ones]) is None
    assert relative_cost(x, [torch.tensor([[float("nan"), 1.0]])]) is None


@pytest.mark.parametrize("model", ["resnet", "resnet_preact", "vgg", "mlp", "vit"])
def test_every_residual_block_of_every_network_is_measured(tmp_path: Path, model: str) -> None:
    config = tiny(model, tmp_path, pipeline={"stages": 1}, evaluate={"at_start": True})
    blueprint = draw_up(config, describe(config))
    stage = build_stage(blueprint, 0, torch.device("cpu"))
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        batch = next(iter(loader))
    costs = stage.forward(batch, train=False).cost_names
    row = measure(stage, batch)
    assert tuple(row["relative_cost_by_block"]) == costs != ()
    assert min(row["relative_cost_by_block"].values()) > 0
    assert 0 < row["straightness"] <= 1
    assert row["monotone_share"] is None  # images go in, features come out
    assert row["monotone_share_by_block"].keys() <= set(costs)


def test_a_row_comes_with_every_validation_of_every_stage(tmp_path: Path) -> None:
    launcher = {"name": "threads"}
    folder = run(tiny("resnet", tmp_path, pipeline={"stages": 2}, train={"max_steps": 16}, launcher=launcher))
    found = {kind: {place[1:] for place in metrics(folder) if place[0] == kind} for kind in ("valid", "geometry")}
    assert found["geometry"] == found["valid"] == {(stage, step) for stage in (0, 1) for step in (0, 8, 16)}
    stages = json.loads((folder / "result.json").read_text())["stages"]
    assert all(0 <= stage["geometry"]["straightness"] <= 1 for stage in stages)
