"""The auxiliary heads: from a stage's activation to logits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipetrgl.errors import ModelError, nearest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Head:
    """A builder from (activation shape, pool, classes), with the numbers of axes it accepts without the batch."""

    build: Callable[[Shape, int | None, int], nn.Module]
    axes: tuple[int, ...]


def build(name: str, pool: int | None, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The head `name` for one stage's activations; forward gives logits (N, num_classes).

    Args:
        name: `HeadConfig.name`.
        pool: `HeadConfig.pool`, side of conv1's average pool; None is 16 on maps of 48 or larger, 8 below; either is
            lowered to the map's own side.
        input_shape: of one activation: (C, H, W), (T, D) or (F,).
        num_classes: outputs; those of next_token are (N, T, num_classes).
    Raises:
        ModelError: an unknown name, a head that cannot read such an activation, or a pool for another head than conv1.
    """
    if name not in _HEADS:
        raise ModelError(f"model.head.name: '{name}' is not allowed. {nearest(name, _HEADS)}")
    if pool is not None and name != "conv1":
        raise ModelError(
            f"model.head.pool: has no effect on the head '{name}'; only conv1 has a pool of a chosen size."
        )
    head = _HEADS[name]
    if len(input_shape) not in head.axes:
        kind = {1: "a flat vector", 2: "tokens", 3: "a map"}[len(input_shape)]
        # that of text goes without saying: the schema lets a gpt have no other, and nothing else have it
        fitting = ", ".join(
            other for other, entry in _HEADS.items() if len(input_shape) in entry.axes and other != "next_token"
        )
        raise ModelError(
            f"model.head.name: '{name}' cannot read {kind} of shape {input_shape}. Heads that fit: {fitting}."
        )
    return head.build(input_shape, pool, num_classes)


class NoHead(nn.Module):
    """In place of the head of a stage that has none: hands the activation on."""

    def forward(self, activation: Tensor) -> Tensor:
        return activation


class Mean(nn.Module):
    """Average over some axes, kept out of `nn.AdaptiveAvgPool2d`, whose backward is not deterministic on CUDA."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class AdaptivePool(nn.Module):
    """Adaptive average pooling of maps of a known size as two matrix products, deterministic on every device.

    y = rows @ x @ columns        (N, C, H, W) -> (N, C, *output)
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], output: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _averages(size[0], output[0]), persistent=False)
        self.register_buffer("columns", _averages(size[1], output[1]).T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def _averages(size: int, output: int) -> Tensor:
    """(output, size) matrix; row i averages the entries floor(i * size / output) .. ceil((i + 1) * size / output)."""
    matrix = torch.zeros(output, size)
    for i in range(output):
        first, end = i * size // output, -(-(i + 1) * size // output)
        matrix[i, first:end] = 1.0 / (end - first)
    return matrix


def _sequence(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def _conv1(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    """The paper's: convolution, ReLU, average pool, BatchNorm after the pool, linear."""
    channels, height, width = shape
    side = min(height, width)
    p = min(pool or (16 if side >= 48 else 8), side)
    return _sequence(
        conv=nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        relu=nn.ReLU(inplace=True),
        pool=nn.AvgPool2d(p),
        norm=nn.BatchNorm2d(channels),
        flatten=nn.Flatten(),
        linear=nn.Linear(channels * (height // p) * (width // p), num_classes),
    )


def _linear1(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    return _sequence(flatten=nn.Flatten(), linear=nn.Linear(math.prod(shape), num_classes))


def _linear2(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    return _sequence(
        flatten=nn.Flatten(),
        linear1=nn.Linear(math.prod(shape), 10 * num_classes),
        sigmoid=nn.Sigmoid(),
        linear2=nn.Linear(10 * num_classes, num_classes),
    )


def _linear3(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    return _sequence(
        flatten=nn.Flatten(),
        linear1=nn.Linear(math.prod(shape), 10 * num_classes),
        norm=nn.BatchNorm1d(10 * num_classes),
        relu=nn.ReLU(inplace=True),
        linear2=nn.Linear(10 * num_classes, num_classes),
    )


def _pool_linear(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    mean = Mean(2, 3) if len(shape) == 3 else nn.Identity()
    return _sequence(pool=mean, linear=nn.Linear(shape[0], num_classes))


def _conv1_fc2(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    """InfoPro's: a map of fewer than 64 channels is halved and gets twice as many, 32 or 64."""
    channels = shape[0]
    hidden, stride = (32, 2) if channels < 32 else (64, 2) if channels < 64 else (channels, 1)
    return _sequence(
        conv=nn.Conv2d(channels, hidden, 3, stride=stride, padding=1, bias=False),
        norm=nn.BatchNorm2d(hidden),
        relu1=nn.ReLU(inplace=True),
        pool=Mean(2, 3),
        linear1=nn.Linear(hidden, 128),
        relu2=nn.ReLU(inplace=True),
        linear2=nn.Linear(128, num_classes),
    )


def _mlp_sr(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    """DGL's: a quarter of the resolution, three 1x1 convolutions, 2x2 pixels, three hidden linear layers."""
    channels, height, width = shape
    quarter = (-(-height // 4), -(-width // 4))
    layers: dict[str, nn.Module] = {"pool1": AdaptivePool((height, width), quarter)}
    for i in range(1, 4):
        layers[f"conv{i}"] = nn.Conv2d(channels, channels, 1, bias=False)
        layers[f"conv_norm{i}"] = nn.BatchNorm2d(channels)
        layers[f"conv_relu{i}"] = nn.ReLU(inplace=True)
    layers["pool2"] = AdaptivePool(quarter, (2, 2))
    layers["flatten"] = nn.Flatten()
    for i in range(1, 4):
        layers[f"linear{i}"] = nn.Linear(4 * channels, 4 * channels)
        layers[f"linear_norm{i}"] = nn.BatchNorm1d(4 * channels)
        layers[f"linear_relu{i}"] = nn.ReLU(inplace=True)
    layers["linear4"] = nn.Linear(4 * channels, num_classes)
    return _sequence(**layers)


def _tokens(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    features = shape[1]
    return _sequence(norm=nn.LayerNorm(features, eps=1e-6), mean=Mean(1), linear=nn.Linear(features, num_classes))


def _next_token(shape: Shape, pool: int | None, num_classes: int) -> nn.Module:
    features = shape[1]
    return _sequence(norm=nn.LayerNorm(features, eps=1e-6), linear=nn.Linear(features, num_classes))


_HEADS = {
    "conv1": _Head(_conv1, axes=(3,)),
    "linear1": _Head(_linear1, axes=(1, 2, 3)),
    "linear2": _Head(_linear2, axes=(1, 2, 3)),
    "linear3": _Head(_linear3, axes=(1, 2, 3)),
    "pool_linear": _Head(_pool_linear, axes=(1, 3)),
    "conv1_fc2": _Head(_conv1_fc2, axes=(3,)),
    "mlp_sr": _Head(_mlp_sr, axes=(3,)),
    "tokens": _Head(_tokens, axes=(2,)),
    "next_token": _Head(_next_token, axes=(2,)),
}
