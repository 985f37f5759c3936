"""InfoPro, softmax variant: the task loss, and a reconstruction that keeps a stage from losing the image.

    L_k = lambda_1 R(w(h)) + lambda_2 CE(F(h), y)       stages 0 .. K - 2
    L_K = CE(F(h), y)                                   the last stage keeps nothing
    w   = resize, conv3x3, BatchNorm, ReLU, conv3x3     to the size of what is reconstructed

    target: image    R(a) = mean BCE(sigmoid(a), pixels)      the paper's: pixels in [0, 1] of the image x
    target: input    R(a) = mean((a - z) ** 2) / var(z)       z, what came into the stage: 1 is an answer of its mean

Source: Wang et al., "Revisiting Locally Supervised Learning", arXiv 2101.10832, section 3: R bounds I(h, x) from below.
Decoder, BCE and the lambdas' straight line over the stages as in the authors' code; docs/method.md has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class PixelError(nn.Module):
    """Binary cross-entropy between sigmoid(answer) and the image's pixels, mean over all of them.

    Args:
        mean, std: what the image was normalised with; one value a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, answer: Tensor, image: Tensor) -> Tensor:
        pixels = (image * self.std + self.mean).clamp(0, 1)  # rounding, a codec's too, may have led outside
        return F.binary_cross_entropy_with_logits(answer, pixels)


@final
class UnexplainedShare(nn.Module):
    """mean((answer - z) ** 2) / var(z)."""

    def forward(self, answer: Tensor, z: Tensor) -> Tensor:
        return F.mse_loss(answer, z) / z.var(correction=0).clamp_min(_LEAST_VARIANCE)


@final
class InfoPro(nn.Module):
    """One stage's, but for the last.

    Args:
        weights: lambda_1 and lambda_2.
        error: R, of the decoder's answer and what it shall be.
        source, hands_on: shapes of what is reconstructed and of h, (C, H, W).
    Raises:
        ModelError: either is no map: nothing to reconstruct it with.
    """

    def __init__(self, weights: tuple[float, float], error: nn.Module, source: Shape, hands_on: Shape) -> None:
        super().__init__()
        for what, shape in (("what is to be reconstructed has", source), ("a stage hands on activations of", hands_on)):
            if len(shape) != 3:
                raise ModelError(
                    f"objective.name: 'infopro' needs the reconstruction of an image or a map, and its decoder reads "
                    f"and writes maps, but {what} shape {shape}; use another objective, or a network of convolutions"
                )
        self.reconstruction, self.task = weights
        self.error = error
        hidden = max(_HIDDEN, source[0])  # never fewer channels than it has to write
        self.decoder = nn.Sequential()
        if source[1:] != hands_on[1:]:
            self.decoder.add_module("resize", Resize((hands_on[1], hands_on[2]), (source[1], source[2])))
        self.decoder.add_module("conv1", nn.Conv2d(hands_on[0], hidden, 3, padding=1))
        self.decoder.add_module("norm", nn.BatchNorm2d(hidden))
        self.decoder.add_module("relu", nn.ReLU(inplace=True))
        self.decoder.add_module("conv2", nn.Conv2d(hidden, source[0], 3, padding=1))

    def forward(self, source: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        answer = self.decoder(h)
        assert answer.shape == source.shape  # no image came, or one came that nobody asked for
        error: Tensor = self.error(answer, source)
        return self.reconstruction * error + self.task * loss
