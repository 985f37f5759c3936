"""ResNets: the numbers of the paper's ResNet-110, and both ways to its transport cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.blocks import Network, Residual
from pipetrgl.config.schema import InitConfig, ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import heads, zoo
from pipetrgl.models.init import initialise
from pipetrgl.models.resnet import OptionA
from pipetrgl.seeds import torch_stream


def built(network: Network, gain: float = 0.1) -> list[nn.Module]:
    blocks = [spec.build() for spec in network.blocks]
    for spec, block in zip(network.blocks, blocks, strict=True):
        initialise(block, InitConfig(gain=gain), torch_stream(0, "weights", spec.name))
    return blocks


def test_resnet_110_in_two_stages_has_the_parameters_of_the_trace() -> None:
    network = zoo.build(ModelConfig(depth=110), (3, 32, 32), 10)
    sizes, shapes = zoo.num_parameters(network), zoo.output_shapes(network)
    assert sum(spec.counted for spec in network.blocks) == 54
    # The stem and 27 blocks, then 27 blocks.
    assert shapes[27] == (32, 16, 16) and shapes[-1] == (64, 8, 8)
    head1, head2 = heads.build("conv1", 16, shapes[27], 10), heads.build("conv1", 8, shapes[-1], 10)
    assert sum(sizes[:28]) + sum(p.numel() for p in head1.parameters()) == 256_602
    assert sum(sizes[28:]) + sum(p.numel() for p in head2.parameters()) == 1_517_962


def test_transport_cost_at_the_start_is_nearly_one_for_each_block() -> None:
    network = zoo.build(ModelConfig(depth=110), (3, 32, 32), 10)
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1234))
    costs = []
    for block in built(network):
        output = block(x)
        x = output.activation.detach()
        costs += [residual.mean_square.item() for residual in output.residuals]
    # 0.3 % is the spread over random streams that the method page states for its own 26.92.
    assert sum(costs[:27]) == pytest.approx(26.92, rel=3e-3)
    assert sum(costs[27:]) == pytest.approx(26.92, rel=3e-3)


def one_step(impl: str, kind: dict[str, object]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Activation, cost, and the gradients of both."""
    network = zoo.build(ModelConfig.model_validate(kind), (3, 16, 16), 10, impl)
    blocks = [block.double() for block in built(network, gain=0.7)]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = torch.zeros((), dtype=torch.float64)
    for block in blocks:
        output = block(x)
        x = output.activation
        cost = cost + sum(mean_square(residual) for residual in output.residuals)
    parameters = [p for block in blocks for p in block.parameters()]
    return x, cost, list(torch.autograd.grad(x.square().mean() + cost, parameters))


def mean_square(residual: Residual) -> Tensor:
    if residual.mean_square is not None:
        return residual.mean_square
    assert residual.value is not None and residual.value[0].numel() == residual.num_features
    return residual.value.square().mean()


@pytest.mark.parametrize("kind", [{"depth": 8}, {"depth": 50, "stem": "cifar", "width": 4}])
def test_the_identity_gives_the_cost_and_the_gradients_of_stored_residuals(kind: dict[str, object]) -> None:
    x1, cost1, grads1 = one_step("autograd", kind)
    x2, cost2, grads2 = one_step("batchnorm", kind)
    assert torch.equal(x1, x2)
    # float64, gradients of order 1 through at most 50 layers.
    torch.testing.assert_close(cost1, cost2, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads1, grads2, rtol=1e-9, atol=1e-12)


def test_impl_decides_whether_residuals_are_kept() -> None:
    x = torch.rand(2, 16, 8, 8)
    for impl, kept in (("autograd", True), ("batchnorm", False), ("auto", False)):
        spec = zoo.build(ModelConfig(depth=8), (3, 8, 8), 10, impl).blocks[1]
        (residual,) = spec.build()(x).residuals
        assert (residual.value is not None, residual.mean_square is None) == (kept, kept)
        assert residual.num_features == 16 * 8 * 8


def test_option_a_keeps_every_second_pixel_and_pads_channels_with_zeros() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = OptionA(new_channels=2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[0, 2], [8, 10]] and y[0, 0].abs().sum() == y[0, 3].abs().sum() == 0


@pytest.mark.parametrize(
    ("stem", "first", "last"),
    [
        ("cifar", (64, 64, 64), (512, 8, 8)),
        ("imagenet", (64, 16, 16), (512, 2, 2)),
        ("tiny_imagenet", (64, 32, 32), (512, 4, 4)),
    ],
)
def test_stems_differ_in_resolution(stem: str, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    network = zoo.build(ModelConfig.model_validate({"depth": 18, "stem": stem}), (3, 64, 64), 10)
    shapes = zoo.output_shapes(network)
    assert shapes[0] == first and shapes[-1] == last


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(depth=18), "depth 18. Allowed: 6n \\+ 2: 8, 14, 20"),
        (ModelConfig(depth=2), "depth 2"),
        (ModelConfig(depth=20, stem="imagenet"), "Allowed: 18, 34, 50, 101, 152"),
    ],
)
def test_a_depth_outside_the_family_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.build(config, (3, 32, 32), 10)
