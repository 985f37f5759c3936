"""The geometry hook: how a stage moves a few validation rows, in the terms of the theory of the transport cost.

    x ─▶ x + r_1 ─▶ .. ─▶ T(x)      how far each block goes, how straight the way is, whether T keeps rows in order

Source: arXiv 2309.17357; docs/method.md explains each number. None of them is a promise about accuracy.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from pipetrgl.blocks import Residual
from pipetrgl.engine.metrics import Row, Sink
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage, StageOutput

_MAX_ROWS = 64
"""All pairs of so many rows are 2,016; the blocks run on them once more a validation."""


@final
class Geometry:
    """Rows of kind "geometry", one a validation, of the first rows of its first micro-batch, in eval mode.

    Args:
        stage: measured; its first replica measures its own share of the rows.
        sink: takes the rows.
    """

    def __init__(self, stage: Stage, sink: Sink) -> None:
        self._stage = stage
        self._sink = sink
        self._begun = False

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if micro_batch.split is not Split.VALID or micro_batch.is_tick:
            return
        if not self._begun:
            first = range(micro_batch.row_start, micro_batch.row_start + _MAX_ROWS)
            self._sink(
                {
                    "kind": "geometry",
                    "stage": self._stage.index,
                    "step": micro_batch.step,
                    "epoch": micro_batch.epoch,
                    **measure(self._stage, micro_batch.share(first)),
                }
            )
        self._begun = not micro_batch.closes_split

    def close(self) -> None:
        pass


@torch.no_grad()
def measure(stage: Stage, micro_batch: MicroBatch) -> Row:
    """The numbers of one row, each None where it is not defined or not finite; the stage is in eval mode."""
    relative: dict[str, float | None] = {}
    monotone: dict[str, float | None] = {}
    steps: list[Tensor] = []
    z: Tensor | None = None
    for name, x, output in stage.each_block(micro_batch, train=False):
        z, y = x if z is None else z, output.activation
        if output.residuals:
            residuals = [_value(residual) for residual in output.residuals]
            relative[name] = relative_cost(x, residuals)
            steps += residuals
            if x.shape == y.shape:
                monotone[name] = monotone_share(x, y)
    assert z is not None
    return {
        "num_samples": micro_batch.num_rows,
        "straightness": straightness(steps),
        "monotone_share": monotone_share(z, y) if z.shape == y.shape else None,
        "monotone_share_by_block": monotone,
        "relative_cost_by_block": relative,
    }


def straightness(steps: Sequence[Tensor]) -> float | None:
    """||sum of r_b||^2 / (M sum of ||r_b||^2), between 0 and 1: 1 where all M residuals are equal, a straight line at
    constant speed.

    Where a stage changes the shape, numerator and denominator are summed over its runs of equal shapes.

    Args:
        steps: residuals in order, (N, ...).
    Returns:
        None where no two neighbouring residuals have the same shape, or nothing moves.
    """
    runs: list[list[Tensor]] = []
    for step in steps:
        if runs and runs[-1][-1].shape == step.shape:
            runs[-1].append(step)
        else:
            runs.append([step])
    together = apart = 0.0
    for run in runs:
        if len(run) > 1:
            together += _square(functools.reduce(operator.add, run))
            apart += len(run) * sum(map(_square, run))
    return _finite(together / apart) if apart > 0 else None


def monotone_share(x: Tensor, y: Tensor) -> float | None:
    """Share of the pairs of rows with <T(x_i) - T(x_j), x_i - x_j> >= 0; an optimal transport map has all of them.

    Args:
        x: what a map takes, (N, ...).
        y: what it gives, of the same shape.
    Returns:
        None for a single row, which has no pair, and where a value is not finite.
    """
    given, taken = y.flatten(1).double(), x.flatten(1).double()
    products = given @ taken.T
    own = products.diagonal()
    inner = own[:, None] + own[None, :] - products - products.T
    pairs = inner[torch.ones_like(inner).triu(1).bool()]
    if len(pairs) == 0 or not bool(pairs.isfinite().all()):
        return None
    return float((pairs >= 0).double().mean())


def relative_cost(x: Tensor, residuals: Sequence[Tensor]) -> float | None:
    """sum of mean(r ** 2) / mean(x ** 2): a block's transport cost in units of what it moves.

    Args:
        x: what the block takes.
        residuals: of the block; a transformer block has two.
    Returns:
        None where x is 0 or a value is not finite.
    """
    before = _square(x) / x.numel()
    after = sum(_square(residual) / residual.numel() for residual in residuals)
    return _finite(after / before) if before > 0 else None


def _value(residual: Residual) -> Tensor:
    assert residual.value is not None  # without a graph r costs nothing to keep: in eval mode every block hands it over
    return residual.value


def _square(x: Tensor) -> float:
    # contiguous: the order of a sum, and with it its last bits, must not depend on the layout in memory
    return float(x.double().contiguous().square().sum())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
