"""The block-wise pre-activation ResNet ("10-1"): identical blocks at full resolution, one to a stage.

x ──┬── BN ─ ReLU ─ conv ─ BN ─ ReLU ─ conv ── r(x) ──(+)──
    └──────────────────────────────────────────────────┘
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.models.batchnorm import refuse_identity

WIDTH = 64


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The uncounted "stem" is a 3x3 convolution; the counted blocks are "blocks.0", "blocks.1", ..."""
    refuse_identity(impl, "blocks.0")
    width = config.width or WIDTH
    stem = BlockSpec("stem", "", partial(Stem, input_shape[0], width), counted=False)
    names = [f"blocks.{index}" for index in range(config.depth)]
    blocks = [BlockSpec(name, f"{name}.", partial(PreactBlock, width)) for name in names]
    return Network(f"resnet_preact-{config.depth}", (stem, *blocks), input_shape, num_classes)


class Stem(nn.Module):
    """One convolution: (N, in, H, W) -> (N, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(self.conv1(x))


class PreactBlock(nn.Module):
    """(N, C, H, W) -> the same, without a final ReLU; the residual branch ends in a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    @property
    def branch_ends(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are the residuals, for the stability guard."""
        return (self.conv2,)

    def forward(self, x: Tensor) -> BlockOutput:
        h = self.conv1(torch.relu_(self.bn1(x)))
        r = self.conv2(torch.relu_(self.bn2(h)))
        return BlockOutput(x + r, (Residual.of(r),))
