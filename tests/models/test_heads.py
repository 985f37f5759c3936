"""The auxiliary heads: sizes, shapes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipetrgl.config.schema import HeadConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import heads

NAMES = HeadConfig.model_fields["name"].annotation.__args__  # type: ignore[union-attr]


def num_parameters(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear1", 368_650),
        ("linear2", 3_687_510),
        ("linear3", 3_687_710),
        ("conv1", 42_762),
        ("pool_linear", 650),
        ("conv1_fc2", 46_602),
        ("mlp_sr", 214_154),
    ],
)
def test_sizes_are_those_of_the_method_page(name: str, count: int) -> None:
    assert num_parameters(heads.build(name, None, (64, 24, 24), 10)) == count


def test_heads_of_resnet_110_in_two_stages_have_the_sizes_of_the_trace() -> None:
    assert num_parameters(heads.build("conv1", 16, (32, 16, 16), 10)) == 9_610
    assert num_parameters(heads.build("conv1", 8, (64, 8, 8), 10)) == 37_642


@pytest.mark.parametrize(("side", "pooled"), [(96, 6), (48, 3), (47, 5), (16, 2), (8, 1), (5, 1)])
def test_default_pool_is_16_on_large_maps_and_8_below(side: int, pooled: int) -> None:
    head = heads.build("conv1", None, (2, side, side), 10)
    linear = head.get_submodule("linear")
    assert isinstance(linear, nn.Linear) and linear.in_features == 2 * pooled**2


def test_a_chosen_pool_is_lowered_to_the_side_of_the_map() -> None:
    assert num_parameters(heads.build("conv1", 16, (64, 8, 8), 10)) == 37_642


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(20,), (7, 16), (3, 1, 1), (16, 9, 10), (40, 12, 12)])
def test_every_head_gives_logits_or_names_those_that_fit(name: str, shape: tuple[int, ...]) -> None:
    x = torch.rand(4, *shape)
    before = x.clone()
    try:
        head = heads.build(name, None, shape, 5)
    except ModelError as error:
        fitting = str(error).split("Heads that fit: ")[1].rstrip(".").split(", ")
        assert name not in fitting and "linear1" in fitting
    else:
        assert head(x).shape == ((4, 7, 5) if name == "next_token" else (4, 5))
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv1", (7, 16), "tokens of shape.*linear1, linear2, linear3, tokens"),
        ("conv1", (16,), "a flat vector of shape.*linear1, linear2, linear3, pool_linear"),
        ("tokens", (16, 8, 8), "a map of shape.*conv1, linear1.*mlp_sr"),
        ("conv", (16, 8, 8), "Did you mean 'conv1'"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        heads.build(name, None, shape, 10)


def test_a_pool_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ModelError, match="only conv1"):
        heads.build("linear1", 8, (16, 8, 8), 10)


@pytest.mark.parametrize(
    ("size", "output"), [((24, 24), (6, 6)), ((9, 10), (3, 3)), ((7, 5), (2, 2)), ((1, 1), (2, 2))]
)
def test_adaptive_pool_equals_torchs(size: tuple[int, int], output: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.adaptive_avg_pool2d(x, output)
    # float32 sums of at most 16 numbers below 1, in another order.
    torch.testing.assert_close(heads.AdaptivePool(size, output)(x), expected, rtol=0, atol=1e-6)
