"""PredSim: the task loss, and a loss that makes rows of one class similar to each other and unlike the others.

    L_predsim = (1 - beta) L_pred + beta L_sim        L_pred  the cross-entropy of the local classifier: the head's
    L_sim     = mean over all pairs of rows of (S(H) - S(Y)) ** 2,   H = conv3x3(h),   Y the one-hot targets
    S(X)_ij   = cos(x_i - mean(x_i), x_j - mean(x_j))                one (N, N) matrix

For maps, x_i holds the standard deviation of each feature map of row i.
Source: Nøkland and Eidnes, "Training Neural Networks with Local Error Signals", arXiv 1901.06656: the adjusted
cosine similarity, L_sim, L_pred and L_predsim. As in the authors' code: the mean over pairs, where the paper has the
sum, and no nonlinearity behind the convolution.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.errors import ModelError

Shape = tuple[int, ...]


def similarity(features: Tensor) -> Tensor:
    """S(X): the cosine of every two rows, each less its own mean; (N, N), 0 for a row without variation.

    Args:
        features: (N, F), or maps (N, C, H, W), of which the standard deviation over pixels is taken first.
    """
    if features.ndim == 4:
        flat = features.flatten(2)
        features = flat.std(2) if flat.shape[2] > 1 else flat.squeeze(2)
    centred = F.normalize(features - features.mean(1, keepdim=True), dim=1, eps=1e-8)
    return centred @ centred.T


def target_similarity(target: Tensor, num_classes: int) -> Tensor:
    """S(Y) of one-hot rows, which is 1 within a class and -1 / (num_classes - 1) between two."""
    same = target[:, None] == target[None, :]
    return torch.where(same, 1.0, -1.0 / (num_classes - 1))


@final
class PredSim(nn.Module):
    """Trained in every stage, the last one too.

    Args:
        beta: share of the similarity loss; the paper has 0.99.
        shape: of one activation that the stage hands on, (C, H, W) or (F,).
        num_classes: at least 2.
    Raises:
        ModelError: activations that are tokens, for which the paper has no similarity.
    """

    def __init__(self, beta: float, shape: Shape, num_classes: int) -> None:
        super().__init__()
        if len(shape) not in (1, 3):
            raise ModelError(
                f"objective.name: 'predsim' compares maps or vectors, but a stage hands on tokens of shape {shape}; "
                "use another objective, or a network of convolutions"
            )
        channels = shape[0]
        self.beta = beta
        self.num_classes = num_classes
        self.project: nn.Module = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            if len(shape) == 3
            else nn.Linear(channels, channels, bias=False)
        )

    def forward(self, source: Tensor, h: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        wanted = target_similarity(target, self.num_classes)
        unlike = F.mse_loss(similarity(self.project(h)), wanted)
        return (1 - self.beta) * loss + self.beta * unlike
