"""The block contract: a network is a list of blocks, and a block gives its output with its residuals.

    x ──┬── residual branch ── r(x) ──(+)── ReLU ── output
        └────── shortcut ──────────────┘

A block is the smallest piece that a cut may separate from its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Residual:
    """r(x) of one residual connection, or only the mean of its squares where r need not be kept.

    Attributes:
        value: r(x), (N, C, H, W) or (N, T, D), before the addition; None where `mean_square` stands for it.
        mean_square: scalar, mean of r ** 2 over all its elements, from the BatchNorm identity; else None.
        num_features: elements of r for one sample (C * H * W): the factor between `norm: mean` and `norm: sum`.
    """

    value: Tensor | None
    mean_square: Tensor | None
    num_features: int

    @staticmethod
    def of(value: Tensor) -> Residual:
        """The residual that keeps r(x) itself."""
        return Residual(value=value, mean_square=None, num_features=value[0].numel())


@dataclass(frozen=True)
class BlockOutput:
    """What a block's forward returns: its activation, and one `Residual` for each residual connection."""

    activation: Tensor
    residuals: tuple[Residual, ...] = ()


class Block(Protocol):
    """A callable `nn.Module` from an activation to a `BlockOutput`.

    It must not change its input in place: on a thread channel, or while it is being sent, the input is
    somebody else's tensor.
    """

    def __call__(self, x: Tensor, /) -> BlockOutput: ...


@dataclass(frozen=True)
class BlockSpec:
    """How to build one block, known on every worker although only one of them builds it.

    Attributes:
        name: unique in the network, "layer1.0"; start weights and dropout are seeded by it.
        prefix: put before the block's own state-dict keys to give the network's, "layer1.0." or "" for a stem.
        build: returns the block as an `nn.Module`, parameters in any state (they are initialised afterwards).
        counted: a residual block or layer that cuts count. The others stay with a neighbour: a stem with the
            first counted block, anything else (a merge, a last norm) with the counted block before it.
    """

    name: str
    prefix: str
    build: Callable[[], nn.Module]
    counted: bool = True


@dataclass(frozen=True)
class Network:
    """A whole network as a list of blocks in order.

    Attributes:
        name: "resnet-110", for messages.
        blocks: in forward order; names are unique.
        input_shape: of one sample, (C, H, W) or (T,), without the batch.
        num_classes: outputs of every auxiliary head.
        reads_tokens: samples are tokens, int64 (T,) below `num_classes`, and heads answer for each of them.
    """

    name: str
    blocks: tuple[BlockSpec, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    reads_tokens: bool = False

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.int64 if self.reads_tokens else torch.float32

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of one sample's target: (), a class, or (T,), a class for each token."""
        return self.input_shape if self.reads_tokens else ()
