"""What the theory of the transport cost asks to compare between stages, from the numbers that a run folder holds.

Source: arXiv 2309.17357; docs/method.md lists them. What it asks of one stage's map is in engine/geometry.py.
"""

from __future__ import annotations

from collections.abc import Sequence


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
