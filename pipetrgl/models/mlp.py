"""Multi-layer perceptrons: a flat input, and layers of one width.

x ── linear ─ BN ─ ReLU ─ dropout ── T(x)        r(x) = T(x) - x where the shapes match
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.models.batchnorm import refuse_identity
from pipetrgl.models.stochastic import Dropout

WIDTH = 256


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The uncounted "stem" flattens; the counted blocks are "layers.0", "layers.1", ..."""
    width = config.width or WIDTH
    widths = [math.prod(input_shape), *[width] * config.depth]
    blocks = [BlockSpec("stem", "", Flatten, counted=False)]
    for index, (before, after) in enumerate(pairwise(widths)):
        name = f"layers.{index}"
        if before == after:
            refuse_identity(impl, name)
        blocks.append(BlockSpec(name, f"{name}.", partial(Layer, before, after, config.batch_norm, config.dropout)))
    return Network(f"mlp-{config.depth}", tuple(blocks), input_shape, num_classes)


class Flatten(nn.Module):
    """(N, ...) -> (N, features)."""

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(x.flatten(1))


class Layer(nn.Module):
    """(N, in) -> (N, out), with the residual T(x) - x if in equals out."""

    def __init__(self, in_features: int, out_features: int, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.norm = nn.BatchNorm1d(out_features) if batch_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.matches = in_features == out_features

    def forward(self, x: Tensor) -> BlockOutput:
        y = self.dropout(self.norm(self.linear(x)).relu_())
        return BlockOutput(y, (Residual.of(y - x),) if self.matches else ())
