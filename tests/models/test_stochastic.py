"""Dropout masks that belong to the rows of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipetrgl.models.stochastic import Dropout, DropPath, reseed

LAYERS = pytest.mark.parametrize("layer", [Dropout(0.4), DropPath(0.4)])


@LAYERS
def test_micro_batches_equal_the_whole_batch(layer: Dropout | DropPath) -> None:
    x = torch.rand(8, 5, 6, generator=torch.Generator().manual_seed(0)) + 1
    layer.reseed(7, row_start=0, batch_rows=8)
    whole = layer(x)
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 8)):
        layer.reseed(7, row_start=start, batch_rows=8)
        parts.append(layer(x[start:end]))
    assert torch.equal(whole, torch.cat(parts))


@LAYERS
def test_recomputing_gives_the_same_output_whatever_the_global_seed(layer: Dropout | DropPath) -> None:
    layer.reseed(7, row_start=0, batch_rows=8)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = layer(torch.ones(8, 50))
    torch.manual_seed(2)
    assert torch.equal(first, layer(torch.ones(8, 50)))
    torch.set_rng_state(state)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    layer = Dropout(0.25)
    layer.reseed(0, row_start=0, batch_rows=100)
    y = layer(torch.ones(100, 1000))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    # Share of 100,000 Bernoulli draws: standard deviation 0.0014, so 0.01 is seven of them.
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_drop_path_drops_whole_rows() -> None:
    layer = DropPath(0.5)
    layer.reseed(0, row_start=0, batch_rows=64)
    rows = layer(torch.ones(64, 3, 4)).flatten(1)
    assert set(rows.amin(1).tolist()) == {0.0, 2.0}
    assert torch.equal(rows.amin(1), rows.amax(1))


@LAYERS
def test_it_is_the_identity_in_eval_mode(layer: Dropout | DropPath) -> None:
    x = torch.rand(4, 3)
    assert layer.eval()(x) is x
    layer.train()


@pytest.mark.parametrize("layer", [Dropout(0.0), DropPath(0.0)])
def test_it_is_the_identity_at_rate_zero(layer: Dropout | DropPath) -> None:
    x = torch.rand(4, 3)
    assert layer(x) is x


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_training_without_reseed_is_a_mistake_of_ours(kind: type[Dropout | DropPath]) -> None:
    with pytest.raises(AssertionError, match="not reseeded"):
        kind(0.5)(torch.ones(2, 2))


@LAYERS
def test_rows_beyond_the_step_are_a_mistake_of_ours(layer: Dropout | DropPath) -> None:
    layer.reseed(0, row_start=6, batch_rows=8)
    with pytest.raises(AssertionError, match="rows 6:9 of a step of 8"):
        layer(torch.ones(3, 2))


def test_reseed_gives_every_layer_of_a_module_its_own_mask() -> None:
    module = nn.Sequential(Dropout(0.5), nn.Sequential(DropPath(0.5)), Dropout(0.5))
    reseed(module, 3, row_start=0, batch_rows=64)
    x = torch.ones(64, 1)
    masks = [layer(x) for layer in module]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    reseed(module, 3, row_start=0, batch_rows=64)
    assert all(torch.equal(mask, layer(x)) for mask, layer in zip(masks, module, strict=True))
