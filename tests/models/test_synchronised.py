"""Synchronised BatchNorm: two replicas' shares against one layer that sees all rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.replicas import ThreadGroup, add_up
from pipetrgl.models.batchnorm import BatchNorm2d
from pipetrgl.models.synchronised import Group, SynchronisedBatchNorm, synchronise
from tests.contracts.test_replicas import together


def alone(norm: nn.BatchNorm2d) -> SynchronisedBatchNorm:
    return SynchronisedBatchNorm(norm, Group(0, 1, lambda tensor: tensor))


def norm_of(dims: int) -> Any:
    norm: Any = nn.BatchNorm1d(3) if dims < 4 else BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


def rows_of(dims: int) -> Tensor:
    return torch.randn([(5, 3), (5, 3, 4), (5, 3, 4, 2)][dims - 2], generator=torch.Generator().manual_seed(0)) * 3 + 2


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("split", [1, 2])
def test_two_replicas_equal_one_layer_over_all_rows(dims: int, split: int) -> None:
    whole, rows = norm_of(dims), rows_of(dims)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    groups = ThreadGroup(2, Alarm(), 20.0)
    start = copy.deepcopy(whole)
    z = rows.clone().requires_grad_()
    (whole(z) * weights).sum().backward()

    def work(replica: int) -> tuple[Any, Tensor]:
        member = groups.member(replica)
        layer = SynchronisedBatchNorm(copy.deepcopy(start), Group(replica, 2, lambda t: add_up(member, t)))
        mine = slice(0, split) if replica == 0 else slice(split, 5)
        part = rows[mine].clone().requires_grad_()
        (layer(part) * weights[mine]).sum().backward()
        assert part.grad is not None
        return layer, part.grad

    results = together(2, work)
    # other orders of the same float32 sums
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([results[0][1], results[1][1]]), z.grad, **close)
    for name in ("weight", "bias"):
        gradients = [getattr(results[replica][0], name).grad for replica in (0, 1)]
        torch.testing.assert_close(sum(gradients), getattr(whole, name).grad, **close)
    for layer, _ in results.values():
        torch.testing.assert_close(layer.running_mean, whole.running_mean, **close)
        torch.testing.assert_close(layer.running_var, whole.running_var, **close)
        assert layer.num_batches_tracked == 1
    assert results[0][0].running_var.equal(results[1][0].running_var)


def test_the_mean_square_and_its_gradients_are_those_of_all_rows() -> None:
    """The transport cost of two replicas, weighted by their shares of the rows, as a stage weights its loss."""
    whole, rows = norm_of(4), rows_of(4)
    start, groups = copy.deepcopy(whole), ThreadGroup(2, Alarm(), 20.0)
    z = rows.clone().requires_grad_()
    y, cost = whole.with_mean_square(z)
    (cost + y.sin().sum()).backward()

    def work(replica: int) -> tuple[Any, Tensor, Tensor]:
        member = groups.member(replica)
        layer = SynchronisedBatchNorm(copy.deepcopy(start), Group(replica, 2, lambda t: add_up(member, t)))
        mine = slice(0, 2) if replica == 0 else slice(2, 5)
        part = rows[mine].clone().requires_grad_()
        y, cost = layer.with_mean_square(part)
        (cost * (len(part) / 5) + y.sin().sum()).backward()
        assert part.grad is not None
        return layer, cost.detach(), part.grad

    results = together(2, work)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for _, mean_square, _ in results.values():
        torch.testing.assert_close(mean_square, cost.detach(), **close)
    torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]), z.grad, **close)
    for name in ("weight", "bias"):
        gradients = [getattr(results[replica][0], name).grad for replica in (0, 1)]
        torch.testing.assert_close(sum(gradients), getattr(whole, name).grad, **close)


def test_gradients_agree_with_finite_differences() -> None:
    layer = alone(norm_of(4).double())
    z = rows_of(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer.with_mean_square(x), (z,))


def test_in_eval_mode_it_is_the_layer_itself() -> None:
    norm, rows = norm_of(4), rows_of(4)
    layer = alone(norm).eval()
    norm.eval()
    assert layer(rows).equal(norm(rows))
    assert layer.with_mean_square(rows)[1].equal(norm.with_mean_square(rows)[1])


def test_every_layer_is_replaced_and_keeps_its_names_and_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), BatchNorm2d(3))
    before = dict(model.state_dict())
    weight = model[2].weight
    synchronise(model, Group(0, 1, lambda tensor: tensor))
    assert sum(isinstance(layer, SynchronisedBatchNorm) for layer in model.modules()) == 2
    assert model.state_dict().keys() == before.keys()
    assert model[2].weight is weight


def test_one_value_per_channel_over_all_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel when training, over all replicas"):
        alone(norm_of(4))(torch.zeros(1, 3, 1, 1))


def test_half_precision_is_normalised_with_float32_statistics() -> None:
    norm, rows = norm_of(4), rows_of(4)
    z = rows.bfloat16().requires_grad_()
    y = alone(copy.deepcopy(norm))(z)
    expected = norm(z.detach())
    assert y.dtype == expected.dtype == torch.bfloat16
    # one rounding to eight bits
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-7, atol=2**-7)
    y.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
