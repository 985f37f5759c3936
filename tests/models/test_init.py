"""Start weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipetrgl.config.schema import InitConfig
from pipetrgl.models.gpt import TokenEmbedding
from pipetrgl.models.init import initialise
from pipetrgl.models.vit import PatchEmbedding, SelfAttention
from pipetrgl.seeds import torch_stream


def start(module: nn.Module, **options: object) -> nn.Module:
    initialise(module, InitConfig.model_validate(options), torch_stream(0, "test"))
    return module


def test_orthogonal_weights_have_the_gain_as_singular_values() -> None:
    weight = start(nn.Conv2d(4, 6, 3), gain=0.1).get_parameter("weight")
    values = torch.linalg.svdvals(weight.flatten(1))
    # float32 QR of a 36 x 6 matrix.
    torch.testing.assert_close(values, torch.full((6,), 0.1), rtol=0, atol=1e-6)


def test_query_key_and_value_start_as_three_orthogonal_layers() -> None:
    attention = start(SelfAttention(8, 2), gain=0.5)
    for projection in attention.get_parameter("in_proj_weight").chunk(3):
        torch.testing.assert_close(projection @ projection.T, 0.25 * torch.eye(8), rtol=0, atol=1e-6)
    assert attention.get_parameter("in_proj_bias").abs().sum() == 0


def test_kaiming_and_trunc_normal_have_their_standard_deviations() -> None:
    kaiming = start(nn.Conv2d(64, 64, 3), name="kaiming").get_parameter("weight")
    trunc = start(nn.Linear(200, 200), name="trunc_normal", gain=0.02).get_parameter("weight")
    # The deviation of 37,000 draws is known to 0.4 %.
    assert kaiming.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert trunc.std().item() == pytest.approx(0.02, rel=0.02)


def test_tables_of_tokens_and_positions_have_a_deviation_of_their_own() -> None:
    embedding = start(TokenEmbedding(256, 64, 256, 0.0), gain=5.0)
    for name in ("tokens.weight", "positions.pos_embedding"):  # of 16,384 draws, known to 0.6 %
        assert embedding.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.03)


def test_normalisation_starts_at_one_and_zero_with_fresh_statistics() -> None:
    norm = nn.BatchNorm2d(3)
    norm(torch.rand(2, 3, 4, 4))
    nn.init.constant_(norm.weight, 5.0)
    start(norm)
    fresh = nn.BatchNorm2d(3).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


def test_the_class_token_starts_at_zero_and_positions_at_random() -> None:
    stem = start(PatchEmbedding(3, 32, 4, num_patches=63, dropout=0.0))
    assert stem.get_parameter("class_token").abs().sum() == 0
    positions = stem.get_parameter("encoder.pos_embedding")
    assert positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_parameter_without_a_rule_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"no start value for '0\.weight' of PReLU"):
        start(nn.Sequential(nn.PReLU()))
