"""Vision transformers: two residuals a block, and inputs that hooks can see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.blocks import Network
from pipetrgl.config.schema import InitConfig, ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import zoo
from pipetrgl.models.init import initialise
from pipetrgl.models.stochastic import reseed
from pipetrgl.models.vit import EncoderLayer, SelfAttention
from pipetrgl.seeds import torch_stream


def vit(**options: object) -> Network:
    config = ModelConfig.model_validate({"name": "vit", "depth": 3, "width": 16, **options})
    return zoo.build(config, (3, 8, 12), 10)


def layer(dropout: float = 0.0, drop_path: float = 0.0) -> EncoderLayer:
    block = EncoderLayer(16, 2, dropout, drop_path)
    initialise(block, InitConfig(gain=1.0), torch_stream(0, "layer"))
    return block


def test_attention_equals_torchs_multihead_attention() -> None:
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    initialise(ours, InitConfig(gain=1.0), torch_stream(0, "attention"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    # float32, 16 terms of order 1.
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-6)


def test_an_encoder_layer_moves_its_tokens_by_its_two_residuals() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    output = layer()(x)
    first, second = (residual.value for residual in output.residuals)
    assert torch.equal(output.activation, x + first + second)


def test_both_residuals_are_measured_after_drop_path() -> None:
    block, x = layer(drop_path=0.5), torch.arange(5120.0).view(64, 5, 16).sin()
    reseed(block, 0, row_start=0, batch_rows=64)
    for residual in block(x).residuals:
        dropped = (residual.value == 0).flatten(1).all(1).sum().item()
        assert 16 < dropped < 48


def test_micro_batches_with_dropout_equal_the_whole_batch() -> None:
    block, x = layer(dropout=0.2, drop_path=0.2), torch.arange(480.0).view(6, 5, 16).sin()
    reseed(block, 0, row_start=0, batch_rows=6)
    whole = block(x).activation
    reseed(block, 0, row_start=4, batch_rows=6)
    # A matrix product may round differently for another number of rows.
    torch.testing.assert_close(block(x[4:]).activation, whole[4:], rtol=0, atol=1e-5)


def test_hooks_see_the_input_of_every_branch_end() -> None:
    block, seen = layer(), []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    for module in block.branch_ends:
        module.register_forward_pre_hook(hook)
    block(torch.rand(2, 5, 16))
    assert seen == [(2, 5, 16), (2, 5, 64)]


def test_drop_path_rises_linearly_over_the_depth() -> None:
    blocks = [spec.build() for spec in vit(drop_path=0.2).blocks if spec.counted]
    assert [block.drop_path2.dropout.p for block in blocks] == [0.0, 0.1, 0.2]  # type: ignore[union-attr]


def test_only_encoder_layers_are_counted() -> None:
    network = vit()
    assert [spec.counted for spec in network.blocks] == [False, True, True, True, False]
    assert zoo.output_shapes(network) == ((7, 16),) * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "side 5 do not tile images of 8x12"),
        ({"patch": 8}, "side 8 do not tile"),
        ({"num_heads": 3}, "3 heads cannot share a width of 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vit(**options)
