"""The stability guard: the smallest tau for which the transport cost cannot make SGD diverge.

For a branch that ends in a convolution or linear layer r = W phi(x), SGD with momentum m is stable only if

    tau > lr * lambda_max / (2 * (1 + m) * C),    lambda_max the largest eigenvalue of E[phi phi^T], C output channels.

Verified in docs/method.md: 0.9 of the limit diverges, 1.1 converges. lambda_max is known once there is a batch; that it
is at least 1 is known before, where the branch ends by adding a learned vector: a bias, or the beta of a BatchNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear


def largest_eigenvalue(layer: Layer, x: Tensor, iterations: int = 20) -> float:
    """lambda_max of E[phi phi^T], phi the layer's input columns, by power iteration on one batch.

    E is the mean over the batch and over output pixels or tokens. The product E[phi phi^T] v is the gradient of
    mean((v . phi) ** 2) / 2, so the columns are never written out.

    Args:
        layer: `nn.Conv2d` (ungrouped) or `nn.Linear`.
        x: its input, (N, C, H, W) or (N, ..., D).
    """
    x = x.detach()
    vector = torch.ones_like(layer.weight[:1], device=x.device)  # deterministic start; all-ones is never orthogonal
    vector = vector / vector.norm()  # to the dominant direction of the non-negative features that follow a ReLU
    eigenvalue = 0.0
    for _ in range(iterations):
        product = _gram_product(layer, x, vector)
        norm = float(product.norm())
        if norm == 0.0:
            return 0.0
        eigenvalue, vector = norm, product / norm
    return eigenvalue


def tau_limit(layer: Layer, x: Tensor, lr: float, momentum: float, norm: str = "mean") -> float:
    """The tau below which SGD diverges on this layer's transport cost alone.

    Args:
        layer: ends a residual branch; `nn.Conv2d` or `nn.Linear`.
        x: its input on one batch.
        lr: learning rate, the largest of the schedule.
        momentum: of SGD.
        norm: of the transport cost; "sum" multiplies the penalty, and so the limit, by the features of a sample.
    """
    with torch.no_grad():
        out = layer(x[:1])
    channels = out.shape[1] if isinstance(layer, nn.Conv2d) else out.shape[-1]
    limit = lr * largest_eigenvalue(layer, x) / (2 * (1 + momentum) * channels)
    return float(limit * out[0].numel()) if norm == "sum" else limit


def certain_limit(shape: tuple[int, ...], lr: float, momentum: float, norm: str = "mean") -> float:
    """The tau below which SGD diverges, whatever the data, on the cost of a branch r = W phi(x) + b, alone.

    With the bias as a column of W, phi holds a constant 1, so lambda_max >= 1. The same holds of BatchNorm's beta, for
    its part of the cost is mean_c(beta_c ** 2).

    Args:
        shape: of r for one sample, (C, H, W) or (T, C).
        lr, momentum, norm: as in `tau_limit`.
    """
    channels = shape[0] if len(shape) == 3 else shape[-1]
    limit = lr / (2 * (1 + momentum) * channels)
    return limit * math.prod(shape) if norm == "sum" else limit


def _gram_product(layer: Layer, x: Tensor, vector: Tensor) -> Tensor:
    with torch.enable_grad():
        vector = vector.detach().requires_grad_()
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1
            projected = torch.nn.functional.conv2d(x, vector, None, layer.stride, layer.padding, layer.dilation)
        else:
            projected = torch.nn.functional.linear(x, vector)
        (product,) = torch.autograd.grad(projected.square().mean() / 2, vector)
    return product
