"""The perceptron: layers of one width."""

from __future__ import annotations

import pytest
import torch

from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import zoo
from pipetrgl.models.mlp import Layer


def test_the_first_layer_has_no_residual_and_the_others_have_one() -> None:
    network = zoo.build(ModelConfig(name="mlp", depth=3, width=8), (1, 4, 4), 10)
    x, counts = torch.rand(5, 1, 4, 4), []
    for spec in network.blocks:
        output = spec.build()(x)
        x = output.activation
        counts.append(len(output.residuals))
    assert counts == [0, 0, 1, 1]
    assert [spec.counted for spec in network.blocks] == [False, True, True, True]


def test_a_residual_is_what_the_layer_adds() -> None:
    layer, x = Layer(4, 4, batch_norm=False, dropout=0.0), torch.rand(3, 4)
    output = layer(x)
    assert torch.equal(output.activation, layer.linear(x).relu())
    assert torch.equal(output.residuals[0].value, output.activation - x)


def test_parameters_of_three_layers() -> None:
    network = zoo.build(ModelConfig(name="mlp", depth=3, width=8), (1, 4, 4), 10)
    # 16 * 8 + 8, then 8 * 8 + 8, each with the 16 of BatchNorm.
    assert zoo.num_parameters(network) == (0, 152, 88, 88)


def test_the_identity_is_refused_for_layers_without_a_branch() -> None:
    with pytest.raises(ModelError, match=r"block 'layers\.1'"):
        zoo.build(ModelConfig(name="mlp", depth=3), (1, 4, 4), 10, "batchnorm")
