"""ResNets of the CIFAR and the ImageNet kind, whose residual branches end in BatchNorm.

    x ──┬── conv ─ BN ─ ReLU ─ conv ─ BN ── r(x) ──(+)── ReLU ──        basic; a bottleneck has three convolutions
        └── identity or shortcut ───────────────────┘

State-dict names are torchvision's.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models.batchnorm import BatchNorm2d, close_branch

IMAGENET_GROUPS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Residual blocks of each resolution group; from depth 50 on they are bottlenecks."""


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The blocks "stem", "layer1.0", "layer1.1", ...; every residual block is counted, the stem is not.

    Raises:
        ModelError: a depth that the stem's family does not have.
    """
    cifar = config.stem == "cifar16"
    kind = BottleneckBlock if config.depth >= 50 and not cifar else BasicBlock
    width = config.width or (16 if cifar else 64)
    blocks = [BlockSpec("stem", "", partial(Stem, input_shape[0], width, config.stem), counted=False)]
    in_channels = width
    for group, num_blocks in enumerate(_groups(config)):
        channels = width * 2**group
        for index in range(num_blocks):
            stride = 2 if group > 0 and index == 0 else 1
            name = f"layer{group + 1}.{index}"
            make = partial(kind, in_channels, channels, stride, option_a=cifar, identity=impl != "autograd")
            blocks.append(BlockSpec(name, f"{name}.", make))
            in_channels = channels * kind.EXPANSION
    return Network(f"resnet-{config.depth}", tuple(blocks), input_shape, num_classes)


class Stem(nn.Module):
    """Convolution, BatchNorm, ReLU, and the max-pool of the ImageNet stem: (N, in, H, W) -> (N, channels, ...)."""

    def __init__(self, in_channels: int, channels: int, stem: str) -> None:
        super().__init__()
        if stem in ("cifar16", "cifar"):
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(self.pool(torch.relu_(self.bn1(self.conv1(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride."""

    EXPANSION = 1

    def __init__(self, in_channels: int, channels: int, stride: int, option_a: bool, identity: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride, option_a)
        self.identity = identity

    def forward(self, x: Tensor) -> BlockOutput:
        h = torch.relu_(self.bn1(self.conv1(x)))
        r, residual = close_branch(self.bn2, self.conv2(h), self.identity)
        # The sum is a new tensor, so ReLU may overwrite it; r itself may be kept for the cost.
        return BlockOutput(torch.relu_(self.downsample(x) + r), (residual,))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride, as in torchvision."""

    EXPANSION = 4

    def __init__(self, in_channels: int, channels: int, stride: int, option_a: bool, identity: bool) -> None:
        super().__init__()
        out_channels = channels * self.EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, option_a)
        self.identity = identity

    def forward(self, x: Tensor) -> BlockOutput:
        h = torch.relu_(self.bn1(self.conv1(x)))
        h = torch.relu_(self.bn2(self.conv2(h)))
        r, residual = close_branch(self.bn3, self.conv3(h), self.identity)
        return BlockOutput(torch.relu_(self.downsample(x) + r), (residual,))


class OptionA(nn.Module):
    """The shortcut without parameters: every second pixel, and zeros for the new channels, half on either side."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def _shortcut(in_channels: int, out_channels: int, stride: int, option_a: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option_a:
        return OptionA(out_channels - in_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _groups(config: ModelConfig) -> tuple[int, ...]:
    """Residual blocks of each resolution group."""
    if config.stem == "cifar16":
        if config.depth >= 8 and config.depth % 6 == 2:
            return ((config.depth - 2) // 6,) * 3
        allowed = "6n + 2: 8, 14, 20, 26, 32, 44, 56, 110, ..."
    else:
        if config.depth in IMAGENET_GROUPS:
            return IMAGENET_GROUPS[config.depth]
        allowed = ", ".join(map(str, IMAGENET_GROUPS))
    raise ModelError(
        f"model.depth: a resnet with stem '{config.stem}' cannot have depth {config.depth}. Allowed: {allowed}."
    )
