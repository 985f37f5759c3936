"""The objective of method.md section 1, on values that can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipetrgl.blocks import BlockOutput, Residual
from pipetrgl.config.schema import ObjectiveConfig, TransportConfig
from pipetrgl.objective import StageObjective, stage_taus, transport_cost

CPU = torch.device("cpu")


def objective(tau: float = 1.0, **options: object) -> StageObjective:
    return StageObjective(ObjectiveConfig.model_validate(options), tau, CPU)


def test_transport_cost_is_zero_for_identity_blocks() -> None:
    assert transport_cost([Residual.of(torch.zeros(2, 3, 4, 4))]) == 0


def test_transport_cost_is_the_mean_square_or_its_sum_over_features() -> None:
    #  r = [[1, 2], [3, 4]]: squares 1 4 9 16, mean 7.5; two features: sum over features, mean over rows 15
    residual = Residual.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert transport_cost([residual], "mean") == 7.5
    assert transport_cost([residual], "sum") == 15


def test_the_two_residuals_of_a_transformer_block_are_added() -> None:
    one, two = Residual.of(torch.ones(2, 5, 3)), Residual.of(2 * torch.ones(2, 5, 3))
    assert transport_cost([one, two]) == 1 + 4


def test_a_block_without_residuals_has_no_transport_cost() -> None:
    with pytest.raises(ValueError, match="no residuals"):
        transport_cost([])
    assert objective().measure(torch.ones(1), BlockOutput(torch.ones(1))) is None


def test_local_loss_is_task_loss_plus_cost_over_two_tau_to_the_last_digit() -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    costs = [torch.tensor(0.7), torch.tensor(1.9)]
    loss = objective(tau=0.3, label_smoothing=0.1).local_loss(logits, target, costs)
    task = F.cross_entropy(logits, target, label_smoothing=0.1)
    assert loss.total.equal(task + (costs[0] + costs[1]) / (2 * 0.3))
    assert loss.task.equal(task)
    assert loss.transport.equal(costs[0] + costs[1])
    assert [float(cost) for cost in loss.by_block] == [float(cost) for cost in costs]


def test_the_task_loss_of_a_text_is_the_mean_over_all_tokens() -> None:
    logits, target = torch.randn(2, 3, 5), torch.tensor([[0, 4, 1], [2, 2, 3]])
    tokens = [logits[n, t].log_softmax(0) for n in range(2) for t in range(3)]
    right = torch.stack([row[int(byte)] for row, byte in zip(tokens, target.flatten(), strict=True)])
    spread = torch.stack([row.mean() for row in tokens])
    expected = -(0.9 * right + 0.1 * spread).mean()
    # float32 sums of six terms
    torch.testing.assert_close(objective(label_smoothing=0.1).task_loss(logits, target), expected, rtol=1e-6, atol=0)


def test_infinite_tau_leaves_the_task_loss_alone_and_keeps_no_graph() -> None:
    for plain in (objective(tau=math.inf), objective(name="vangl")):
        x = torch.randn(2, 3, requires_grad=True)
        cost = plain.measure(x, BlockOutput(x, (Residual.of(x),)))
        assert cost is not None
        assert not cost.requires_grad
        loss = plain.local_loss(x, torch.tensor([0, 1]), [cost])
        assert loss.total.equal(F.cross_entropy(x, torch.tensor([0, 1])))


@pytest.mark.parametrize(("kind", "expected"), [("branch", 4.0), ("displacement", 1.0), ("stage", None)])
def test_kinds_measure_the_branch_the_block_or_the_whole_stage(kind: str, expected: float | None) -> None:
    #  x = 1, branch r = 2, output 2 after a ReLU or a scale: displacement 2 - 1 = 1
    x, output = torch.ones(2, 3), BlockOutput(2 * torch.ones(2, 3), (Residual.of(2 * torch.ones(2, 3)),))
    measured = objective(transport={"kind": kind}).measure(x, output)
    assert measured == expected if expected is not None else measured is None


def test_the_whole_stage_is_measured_only_for_its_kind() -> None:
    z, out = torch.ones(2, 3), 3 * torch.ones(2, 3)
    assert objective(transport={"kind": "stage"}).measure_stage(z, out) == 4
    assert objective().measure_stage(z, out) is None


def test_displacement_exists_only_where_shapes_match() -> None:
    residual = (Residual.of(torch.ones(2, 6)),)
    measure = objective(transport={"kind": "displacement"}).measure
    assert measure(torch.ones(2, 3), BlockOutput(torch.ones(2, 6), residual)) is None


@pytest.mark.parametrize(
    ("options", "num_stages", "expected"),
    [
        ({"tau": 2.0}, 3, (2.0, 2.0, 2.0)),
        ({"tau": [1.0, 5.0]}, 2, (1.0, 5.0)),
        ({"tau": 2.0, "half_rule": True}, 4, (1.0, 1.0, 2.0, 2.0)),
        ({"tau": 2.0, "half_rule": True}, 5, (1.0, 1.0, 2.0, 2.0, 2.0)),
    ],
)
def test_tau_of_every_stage(options: dict[str, object], num_stages: int, expected: tuple[float, ...]) -> None:
    assert stage_taus(TransportConfig.model_validate(options), num_stages) == expected


def test_a_multiplier_grows_every_s_steps_and_that_step_uses_it() -> None:
    #  lambda_0 = 1, h = 0.5, s = 2, task loss ln 2 each step: lambda is 1 at step 0, 1 + 0.5 ln 2 at steps 1 and 2
    multipliers = {"enabled": True, "initial": 1.0, "step_size": 0.5, "every": 2}
    driven = objective(transport={"multipliers": multipliers})
    logits, target, cost = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.tensor(3.0)
    weighted = []
    for step in range(3):
        driven.weight.observe(driven.observed_loss(logits, target), step)
        loss = driven.local_loss(logits, target, [cost])
        weighted.append(float(loss.total - loss.task))
    grown = 1 + 0.5 * math.log(2)
    assert weighted == pytest.approx([3.0, 3 / grown, 3 / grown])


def test_a_multiplier_can_follow_the_unsmoothed_task_loss() -> None:
    def grown(on: str) -> float:
        options = {"multipliers": {"enabled": True, "every": 1, "on": on}}
        driven = objective(label_smoothing=0.5, transport=options)
        loss = driven.observed_loss(torch.tensor([[50.0, 0.0]]), torch.tensor([0]))  # a certain and right answer
        driven.weight.observe(loss, step=0)
        return float(driven.weight.state()["multiplier"])

    assert grown("unsmoothed_task_loss") == 1.0
    assert grown("task_loss") > 10


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_factor_test_the_optimum_of_a_free_map_is_z_over_one_plus_tau(norm: str) -> None:
    #  0.5 ||y||^2 (mean over rows) + C(y - z) / (2 tau):  y = z / (1 + tau) for sum, z / (1 + tau d) for mean
    z, tau, d = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]], dtype=torch.float64), 0.7, 3
    y = z.clone().requires_grad_()
    for _ in range(400):
        loss = 0.5 * y.square().sum(1).mean() + transport_cost([Residual.of(y - z)], norm) / (2 * tau)
        (gradient,) = torch.autograd.grad(loss, y)
        y = (y - 0.5 * gradient).detach().requires_grad_()
    expected = z / (1 + tau) if norm == "sum" else z / (1 + tau * d)
    assert torch.allclose(y, expected, atol=1e-9)  # a contraction by at least 0.7 a step, 400 steps
