"""VGG: layers without a skip."""

from __future__ import annotations

import pytest
import torch

from pipetrgl.blocks import Network
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import zoo
from pipetrgl.models.vgg import Layer


def vgg(depth: int, side: int = 32, impl: str = "auto", **options: object) -> Network:
    config = ModelConfig.model_validate({"name": "vgg", "depth": depth, **options})
    return zoo.build(config, (3, side, side), 10, impl)


def test_vgg_19_has_12_residuals_in_16_layers() -> None:
    network = vgg(19, width=4)
    x, residuals = torch.rand(2, 3, 32, 32), []
    for spec in network.blocks:
        output = spec.build()(x)
        x = output.activation
        residuals += output.residuals
    assert len(network.blocks) == sum(spec.counted for spec in network.blocks) == 16
    assert len(residuals) == 12


def test_a_residual_is_what_the_layer_adds_to_its_pooled_input() -> None:
    layer = Layer(4, 4, position=7, pool=True, batch_norm=True)
    x = torch.rand(2, 4, 6, 6)
    output = layer(x)
    (residual,) = output.residuals
    assert torch.equal(residual.value, output.activation - torch.nn.functional.max_pool2d(x, 2))


def test_a_pool_opens_the_next_layer() -> None:
    assert [shape[-1] for shape in zoo.output_shapes(vgg(11))] == [32, 16, 8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_depth_counts_the_convolutions_beside_three_linear_layers(depth: int) -> None:
    assert len(vgg(depth).blocks) == depth - 3


def test_a_map_too_small_to_pool_names_the_block() -> None:
    with pytest.raises(ModelError, match=r"vgg-11: block 'features.22' cannot work on .* \(512, 1, 1\)"):
        zoo.output_shapes(vgg(11, side=8))


def test_a_depth_outside_the_family_is_refused() -> None:
    with pytest.raises(ModelError, match="depth 12. Allowed: 11, 13, 16, 19"):
        vgg(12)


def test_the_identity_is_refused_where_no_branch_ends_in_batchnorm() -> None:
    with pytest.raises(ModelError, match="'batchnorm' needs .* block 'features.3'"):
        vgg(19, impl="batchnorm")
