"""What the theory of the transport cost asks to look at, in numbers; none of them is a promise about accuracy.

T_k moves z by residuals r_1 .. r_M; a greedy step of a gradient flow lowers its energy, goes straight, is monotone.
Source: arXiv 2309.17357; docs/method.md lists them. Functions of tensors take what a batch gives, functions of numbers
what a run folder holds.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a report of numbers alone does not load torch
    from torch import Tensor


def energy_rises(task_losses: Sequence[float], weighted_costs: Sequence[float]) -> list[bool]:
    """CE_{k+1} + C_{k+1} / (2 tau) > CE_k, for stages 1 .. K - 1: one flag fewer than there are stages.

    A stage that is the identity, under the head of the stage before, has equality: a flag says that staying would have
    been better, or that the two heads differ in what they can do.
    """
    energies = [task + cost for task, cost in zip(task_losses, weighted_costs, strict=True)]
    return [after > before for before, after in zip(task_losses, energies[1:], strict=False)]


def stagnation(accuracies: Sequence[float]) -> float:
    """max_k accuracy_k - accuracy_K: what is lost by using the last head; 0 where the last is the best."""
    return max(accuracies) - accuracies[-1]


def straightness(residuals: Sequence[Tensor]) -> float | None:
    """||sum of r_b||^2 / (M sum of ||r_b||^2), between 0 and 1: 1 where all M residuals are equal, a straight line at
    constant speed; None where nothing moves.

    Args:
        residuals: of the same shape, (N, ...), one a block.
    """
    moved = sum(float(residual.square().sum()) for residual in residuals)
    if moved == 0:
        return None
    whole = functools.reduce(operator.add, residuals)
    return float(whole.square().sum()) / (len(residuals) * moved)


def monotone_share(x: Tensor, y: Tensor) -> float:
    """Share of the pairs of rows with <T(x_i) - T(x_j), x_i - x_j> >= 0; an optimal transport map has all of them.

    Args:
        x: what a map takes, (N, ...), at least two rows.
        y: what it gives, of the same shape.
    """
    given, taken = y.flatten(1).double(), x.flatten(1).double()
    products = given @ taken.T
    own = products.diagonal()
    inner = own[:, None] + own[None, :] - products - products.T
    rows = len(x)
    pairs = inner.triu(1)[inner.new_ones(rows, rows).triu(1).bool()]
    return float((pairs >= 0).double().mean())


def relative_cost(x: Tensor, residual: Tensor) -> float | None:
    """mean(r ** 2) / mean(x ** 2): a block's transport cost in units of what it moves; ||r||^2 / ||x||^2 where the
    shapes are equal. None where x is 0.
    """
    before = float(x.square().mean())
    return float(residual.square().mean()) / before if before > 0 else None
