"""The BatchNorm that knows the mean square of its output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.models.batchnorm import BatchNorm2d
from pipetrgl.studies.saved import SavedBytes

TRIPLE = tuple[Tensor, Tensor, Tensor]


def random_norm(channels: int, dtype: torch.dtype, eps: float = 1e-5) -> BatchNorm2d:
    norm = BatchNorm2d(channels, eps=eps).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    return norm


def random_input(dtype: torch.dtype, channels: int = 3) -> Tensor:
    z = torch.randn(4, channels, 5, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return (0.1 * z + 0.3).requires_grad_()


def gradients(z: Tensor, norm: nn.BatchNorm2d, loss: Tensor) -> TRIPLE:
    dz, dweight, dbias = torch.autograd.grad(loss, (z, norm.weight, norm.bias))
    return dz, dweight, dbias


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("with_task", [False, True])
def test_identity_equals_autograd_with_all_gradients(eps: float, with_task: bool) -> None:
    z, norm = random_input(torch.float64), random_norm(3, torch.float64, eps)
    y, cost = norm.with_mean_square(z)
    stored = norm(z)
    task = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype) * with_task
    by_identity = gradients(z, norm, 7 * cost + (y * task).sum())
    by_autograd = gradients(z, norm, 7 * stored.square().mean() + (stored * task).sum())
    # float64: sums of a few hundred terms of order 1 round at 1e-14.
    torch.testing.assert_close(cost, stored.square().mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_identity, by_autograd, rtol=0, atol=1e-12)


def test_gradcheck_of_output_and_cost() -> None:
    z = random_input(torch.float64, channels=2)
    norm = random_norm(2, torch.float64, eps=1e-2)
    # gradcheck moves its inputs in place, so the module sees its own parameters move.
    assert torch.autograd.gradcheck(lambda z, *_: norm.with_mean_square(z), (z, norm.weight, norm.bias))


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_are_those_of_plain_batchnorm_bit_for_bit(momentum: float | None) -> None:
    ours, plain = BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for step in range(3):
        z = random_input(torch.float32).detach() * (1 + step)
        assert torch.equal(ours.with_mean_square(z)[0], plain(z))
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("cost_weight", [None, 0.0])
def test_unused_cost_leaves_output_and_gradients_bit_equal(cost_weight: float | None) -> None:
    z, norm = random_input(torch.float32), random_norm(3, torch.float32)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    y, cost = norm.with_mean_square(z)
    loss = y.sin().sum() if cost_weight is None else y.sin().sum() + cost_weight * cost
    expected = plain(z)
    assert torch.equal(y, expected)
    for ours, theirs in zip(gradients(z, norm, loss), gradients(z, plain, expected.sin().sum()), strict=True):
        assert torch.equal(ours, theirs)


def test_cost_alone_gives_gradients() -> None:
    z, norm = random_input(torch.float64), random_norm(3, torch.float64)
    _, cost = norm.with_mean_square(z)
    dz, dweight, dbias = gradients(z, norm, cost)
    assert dz.abs().max() > 0 and dweight.abs().max() > 0 and dbias.abs().max() > 0


def saved_bytes(norm: nn.BatchNorm2d, z: Tensor, identity: bool) -> int:
    """Bytes kept for the backward pass, z included, without parameters and buffers."""
    with SavedBytes([*norm.parameters(), *norm.buffers()]) as saved:
        if identity:
            assert isinstance(norm, BatchNorm2d)
            graph = norm.with_mean_square(z)
            assert graph[1].grad_fn is not None
        else:
            assert norm(z).grad_fn is not None
    return saved.total


def test_it_saves_the_bytes_that_plain_batchnorm_saves() -> None:
    z, norm = random_input(torch.float32), BatchNorm2d(3)
    plain = nn.BatchNorm2d(3)
    assert saved_bytes(norm, z, identity=True) == saved_bytes(plain, z, identity=False) == 4 * (z.numel() + 3 + 3)


def test_evaluation_measures_its_output_and_keeps_the_statistics() -> None:
    z, norm = random_input(torch.float32), random_norm(3, torch.float32).eval()
    before = copy.deepcopy(norm.state_dict())
    y, cost = norm.with_mean_square(z)
    assert torch.equal(y, norm(z)) and torch.equal(cost, y.square().mean())
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm2d(3).with_mean_square(torch.zeros(1, 3, 1, 1))


def test_three_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNorm2d(3).with_mean_square(torch.zeros(3, 3, 1))
