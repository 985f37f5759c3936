"""Decoder-only transformers: parameters that can be counted, and no token that sees a later one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipetrgl.blocks import Network
from pipetrgl.config.schema import InitConfig, ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import heads, zoo
from pipetrgl.models.init import initialise
from pipetrgl.seeds import torch_stream


def gpt(**options: object) -> Network:
    return zoo.build(ModelConfig.model_validate({"name": "gpt", "depth": 3, "width": 16, **options}), (5,), 256)


def logits_of_every_block(network: Network, tokens: Tensor) -> list[Tensor]:
    """Those of a head behind each counted block."""
    x, found = tokens, []
    for spec in network.blocks:
        block = spec.build()
        initialise(block, InitConfig(gain=1.0), torch_stream(0, spec.name))
        x = block(x).activation
        if spec.counted:
            head = heads.build("next_token", None, (5, 16), 256)
            initialise(head, InitConfig(gain=1.0), torch_stream(0, "head", spec.name))
            found.append(head(x))
    return found


def test_parameters_are_those_that_one_counts_by_hand() -> None:
    #  stem: 256 and 5 rows of 16; a layer: 2 LayerNorms of 2 D, attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D
    stem, layer = 256 * 16 + 5 * 16, 12 * 16**2 + 13 * 16
    assert zoo.num_parameters(gpt()) == (stem, layer, layer, layer)
    head = heads.build("next_token", None, (5, 16), 256)
    assert sum(parameter.numel() for parameter in head.parameters()) == 2 * 16 + 16 * 256 + 256


def test_only_layers_are_counted_and_every_one_hands_on_a_vector_for_each_token() -> None:
    network = gpt()
    assert [spec.counted for spec in network.blocks] == [False, True, True, True]
    assert zoo.output_shapes(network) == ((5, 16),) * 4
    assert (network.input_dtype, network.target_shape) == (torch.int64, (5,))


@pytest.mark.parametrize("changed", range(5))
def test_a_token_changes_no_answer_before_its_own_and_every_one_from_there_on(changed: int) -> None:
    tokens = torch.tensor([[74, 97, 110, 101, 46], [1, 2, 3, 4, 5]])
    other = tokens.clone()
    other[0, changed] = 200
    pairs = zip(logits_of_every_block(gpt(), tokens), logits_of_every_block(gpt(), other), strict=True)
    for one, two in pairs:
        same = [bool(torch.equal(one[0, t], two[0, t])) for t in range(5)]
        assert same == [t < changed for t in range(5)]
        assert torch.equal(one[1], two[1])


def test_a_token_is_told_from_itself_at_another_position() -> None:
    (first, *_) = logits_of_every_block(gpt(), torch.full((1, 5), 7))
    assert not torch.allclose(first[0, 0], first[0, 1])


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"num_heads": 3}, (5,), "3 heads cannot share a width of 16"),
        ({"patch": 8}, (5,), "model.patch: has no effect on a gpt"),
        ({}, (3, 8, 8), r"a gpt reads rows of text \(T,\), not samples of shape \(3, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], shape: tuple[int, ...], message: str) -> None:
    config = ModelConfig.model_validate({"name": "gpt", "depth": 2, "width": 16, **options})
    with pytest.raises(ModelError, match=message):
        zoo.build(config, shape, 256)
