"""InfoPro, softmax variant: the task loss, and a reconstruction that keeps a stage from losing what came in.

    L_k = lambda_1 mean((w(h) - z) ** 2) / var(z) + lambda_2 CE(F(h), y)      stages 0 .. K - 2
    L_K = CE(F(h), y)                                                        the last stage keeps nothing
    w   = resize to z's size, conv3x3, BatchNorm, ReLU, conv3x3

The paper bounds I(h, x) from below by the reconstruction of the image x. Here each stage reconstructs its own input z,
which is the image in stage 0 only: docs/method.md says why. The division by var(z) makes one lambda_1 mean the same in
every stage: 1 is the error of a decoder that answers with the mean.
Source: Wang et al., "Revisiting Locally Supervised Learning", arXiv 2101.10832, section 3; lambdas on a straight line
over the stages as in the authors' code.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.errors import ModelError

Shape = tuple[int, ...]

_HIDDEN = 12  # the authors' decoder, whose output is an image of three channels
_LEAST_VARIANCE = 1e-5  # an input that is the same everywhere asks for no reconstruction


def on_the_line(ends: tuple[float, float], stage: int, num_stages: int) -> float:
    """The weight of a stage between those of stage 0 and of stage K - 2, the last but one."""
    share = stage / (num_stages - 2) if num_stages > 2 else 0.0
    return ends[0] * (1 - share) + ends[1] * share


class Resize(nn.Module):
    """Bilinear, corners aligned: y = rows @ x @ columns, whose backward is deterministic on every device."""

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], output: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _interpolation(size[0], output[0]), persistent=False)
        self.register_buffer("columns", _interpolation(size[1], output[1]).T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def _interpolation(size: int, output: int) -> Tensor:
    """(output, size) matrix; row i reads the two neighbours of i (size - 1) / (output - 1)."""
    columns = torch.eye(size)[None]  # channel j is the j-th unit vector
    return F.interpolate(columns, size=output, mode="linear", align_corners=True)[0].T.contiguous()


@final
class InfoPro(nn.Module):
    """One stage's, but for the last.

    Args:
        weights: lambda_1 and lambda_2.
        came_in, hands_on: shapes of z and h, (C, H, W).
    Raises:
        ModelError: either is no map: nothing to reconstruct it with.
    """

    def __init__(self, weights: tuple[float, float], came_in: Shape, hands_on: Shape) -> None:
        super().__init__()
        for name, shape in (("takes", came_in), ("hands on", hands_on)):
            if len(shape) != 3:
                raise ModelError(
                    f"objective.name: 'infopro' needs the reconstruction of a stage's input, and its decoder reads and "
                    f"writes maps, but a stage {name} activations of shape {shape}; use another objective, or a "
                    "network of convolutions"
                )
        self.reconstruction, self.task = weights
        hidden = max(_HIDDEN, came_in[0])  # never fewer channels than it has to write
        self.decoder = nn.Sequential()
        if came_in[1:] != hands_on[1:]:
            self.decoder.add_module("resize", Resize((hands_on[1], hands_on[2]), (came_in[1], came_in[2])))
        self.decoder.add_module("conv1", nn.Conv2d(hands_on[0], hidden, 3, padding=1))
        self.decoder.add_module("norm", nn.BatchNorm2d(hidden))
        self.decoder.add_module("relu", nn.ReLU(inplace=True))
        self.decoder.add_module("conv2", nn.Conv2d(hidden, came_in[0], 3, padding=1))

    def forward(self, z: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        error = F.mse_loss(self.decoder(h), z) / z.var(correction=0).clamp_min(_LEAST_VARIANCE)
        return self.reconstruction * error + self.task * loss
