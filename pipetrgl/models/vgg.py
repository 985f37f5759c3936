"""VGG networks: plain convolutions, every one a counted block.

    x ── [max-pool] ──┬── conv ─ BN ─ ReLU ── T        r = T(x) - x, x after the pool, where the channels match

State-dict names are torchvision's. Its last max-pool, which no convolution follows, is left out.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models.batchnorm import refuse_identity

WIDTH = 64
GROUPS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions of each resolution group; a max-pool stands between two groups."""
FACTORS = (1, 2, 4, 8, 8)
"""Channels of each resolution group, in units of the width."""


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """One counted block for each convolution, "features.0", ... by its index in torchvision's `features`.

    Raises:
        ModelError: a depth that is not in the family.
    """
    if config.depth not in GROUPS:
        allowed = ", ".join(map(str, GROUPS))
        raise ModelError(f"model.depth: a vgg cannot have depth {config.depth}. Allowed: {allowed}.")
    width = config.width or WIDTH
    blocks: list[BlockSpec] = []
    before, position = input_shape[0], 0
    for group, (num_convolutions, factor) in enumerate(zip(GROUPS[config.depth], FACTORS, strict=True)):
        for index in range(num_convolutions):
            pool = group > 0 and index == 0
            position += pool
            name, channels = f"features.{position}", width * factor
            if before == channels:
                refuse_identity(impl, name)
            make = partial(Layer, before, channels, position, pool, config.batch_norm)
            blocks.append(BlockSpec(name, "features.", make))
            before, position = channels, position + (3 if config.batch_norm else 2)
    return Network(f"vgg-{config.depth}", tuple(blocks), input_shape, num_classes)


class Layer(nn.Module):
    """(N, in, H, W) -> (N, out, H, W), or half of H and W where it opens with the max-pool.

    Its convolution and BatchNorm are named by their position in torchvision's `features`: "7" and "8".
    """

    def __init__(self, in_channels: int, channels: int, position: int, pool: bool, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1)]
        if batch_norm:
            layers.append(nn.BatchNorm2d(channels))
        for offset, layer in enumerate(layers):
            self.add_module(str(position + offset), layer)
        self._names = [str(position + offset) for offset in range(len(layers))]
        self.matches = in_channels == channels
        self.opens_with_pool = pool

    def forward(self, x: Tensor) -> BlockOutput:
        if self.opens_with_pool:
            x = nn.functional.max_pool2d(x, 2)
        y = x
        for name in self._names:
            y = self.get_submodule(name)(y)
        y = y.relu_()
        return BlockOutput(y, (Residual.of(y - x),) if self.matches else ())
