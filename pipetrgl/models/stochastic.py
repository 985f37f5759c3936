"""Dropout and stochastic depth, whose masks belong to the rows of a step, not to whoever computes them.

rows of the step   0 1 2 3 4 5 6 7      one mask, drawn for all of them from one seed
replica 0          0 1 2 3              reads its own rows of the mask,
replica 1                  4 5 6 7      so two replicas, or two micro-batches, equal the whole batch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipetrgl.seeds import derive


@dataclass(frozen=True)
class Rows:
    """Which mask to draw, and which of its rows to use."""

    seed: int
    row_start: int
    batch_rows: int


class Dropout(nn.Module):
    """Multiplies each element by 0 with probability p, else by 1 / (1 - p); in eval mode the identity."""

    def __init__(self, p: float) -> None:
        super().__init__()
        assert 0.0 <= p < 1.0, p
        self.p = p
        self.rows: Rows | None = None

    def reseed(self, seed: int, row_start: int, batch_rows: int) -> None:
        """Choose the mask of the next forward passes: the same one in each, so recomputing gives the same output.

        Args:
            seed: of the step and the layer.
            row_start: first row of the next inputs, counted in the whole batch of the step.
            batch_rows: rows of the step, over all micro-batches and replicas.
        """
        self.rows = Rows(seed, row_start, batch_rows)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        rows = self.rows
        assert rows is not None, "dropout was not reseeded for this step"
        end = rows.row_start + x.size(0)
        assert end <= rows.batch_rows, f"rows {rows.row_start}:{end} of a step of {rows.batch_rows}"
        # Drawn on the CPU, so that the mask does not depend on the device either.
        generator = torch.Generator().manual_seed(rows.seed)
        drawn = torch.rand(rows.batch_rows, *x.shape[1:], generator=generator)
        kept = drawn[rows.row_start : end] >= self.p
        return x * kept.to(x).div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropPath(nn.Module):
    """Stochastic depth at the end of a residual branch: drops whole rows, as `Dropout` drops elements."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = Dropout(p)

    def reseed(self, seed: int, row_start: int, batch_rows: int) -> None:
        """As `Dropout.reseed`."""
        self.dropout.reseed(seed, row_start, batch_rows)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout.p == 0.0:
            return x
        ones = x.new_ones(x.size(0), *[1] * (x.ndim - 1))
        dropped: Tensor = x * self.dropout(ones)
        return dropped


def reseed(module: nn.Module, seed: int, row_start: int, batch_rows: int) -> None:
    """Reseed every `Dropout` and `DropPath` of a module, each from `seed` and its place among them."""
    layers = [layer for layer in module.modules() if isinstance(layer, Dropout)]  # a DropPath holds one
    for ordinal, layer in enumerate(layers):
        layer.reseed(derive(seed, "dropout", ordinal), row_start, batch_rows)
