"""The local objective of one stage: task loss + transport cost / (2 tau).

    loss_k = CE(F_k(T_k(z)), y) + C_k / (2 tau_k),    C_k = sum over the stage's residual blocks b of mean(r_b ** 2)

Source: arXiv 2309.17357 eq. (10), with means as in the authors' code (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor

from pipetrgl.blocks import BlockOutput, Residual
from pipetrgl.config.schema import MultiplierConfig, ObjectiveConfig, TransportConfig


def transport_cost(residuals: Sequence[Residual], norm: str = "mean") -> Tensor:
    """How far one block moved its activations: the sum over its residuals of mean(r ** 2).

    Args:
        residuals: of one block, at least one; a transformer block has two.
        norm: "mean" over all elements, or "sum" over features and mean over the batch.
    Returns:
        Scalar, squared activation units; zero if every residual is zero.
    Raises:
        ValueError: no residuals; the block has none, for its input and output shapes differ.
    Source: arXiv 2309.17357 eq. (10).
    """
    if not residuals:
        raise ValueError("transport_cost: no residuals; a block whose input and output shapes differ has none")
    terms = [_mean_square(residual) * (residual.num_features if norm == "sum" else 1) for residual in residuals]
    return torch.stack(terms).sum()


def _mean_square(residual: Residual) -> Tensor:
    if residual.mean_square is not None:
        return residual.mean_square
    assert residual.value is not None
    return _wide(residual.value).square().mean()


def _wide(x: Tensor) -> Tensor:
    """At least float32, whatever the blocks compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TransportWeight(Protocol):
    """What stands in front of the transport cost, fixed or driven by the task loss."""

    def weighted(self, cost: Tensor) -> Tensor:
        """The cost times the weight."""

    def observe(self, task_loss: Tensor, step: int) -> None:
        """Called once a step with the current task loss, before the weight is used; `step` counts the stage's own."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...

    def value(self) -> Tensor:
        """Scalar, for metrics."""


@final
class FixedWeight:
    """1 / (2 tau)."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def weighted(self, cost: Tensor) -> Tensor:
        return cost / (2 * self.tau)

    def observe(self, task_loss: Tensor, step: int) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    def value(self) -> Tensor:
        return torch.tensor(1 / (2 * self.tau))


@final
class MultiplierWeight:
    """1 / lambda, lambda growing by h * task loss every s steps; that same step already uses the new weight.

    Source: Uzawa's method as in arXiv 2309.17357 section 3.3 and the authors' code.
    """

    def __init__(self, config: MultiplierConfig, device: torch.device) -> None:
        self.every = config.every
        self.step_size = config.step_size
        self.multiplier = torch.tensor(config.initial, device=device)

    def weighted(self, cost: Tensor) -> Tensor:
        return cost / self.multiplier

    def observe(self, task_loss: Tensor, step: int) -> None:
        if (step + 1) % self.every == 0:
            self.multiplier = self.multiplier + self.step_size * task_loss.detach()

    def state(self) -> dict[str, Tensor]:
        return {"multiplier": self.multiplier}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.multiplier = state["multiplier"].to(self.multiplier)

    def value(self) -> Tensor:
        return 1 / self.multiplier


@final
@dataclass(frozen=True)
class LocalLoss:
    """The parts of a stage's loss on one micro-batch; scalars on the stage's device.

    Attributes:
        total: what is differentiated.
        task: cross-entropy, label smoothing included.
        transport: C_k, not weighted, without graph; zero where no block has a residual.
        by_block: detached transport cost of each block that has one, in block order.
    """

    total: Tensor
    task: Tensor
    transport: Tensor
    by_block: tuple[Tensor, ...]


@final
class StageObjective:
    """Scores one stage: `measure` each block as it runs, then `local_loss` once the head has answered.

    Residuals are reduced to their cost at once, so none outlives its block unless its gradient needs it.

    Args:
        config: the objective section.
        tau: this stage's own; infinity is plain greedy learning, bit for bit.
        device: of the multiplier.
        measures: False: no block's transport cost is measured.
    """

    def __init__(self, config: ObjectiveConfig, tau: float, device: torch.device, measures: bool = True) -> None:
        self.measures = measures
        self.label_smoothing = config.label_smoothing
        self.kind = config.transport.kind
        self.norm = config.transport.norm
        self.unsmoothed = config.transport.multipliers.on == "unsmoothed_task_loss"
        self.tau = tau
        multipliers = config.transport.multipliers
        self.weight: TransportWeight
        if config.name == "trgl" and multipliers.enabled:
            self.weight = MultiplierWeight(multipliers, device)
            self.regularised = True
        else:
            self.weight = FixedWeight(tau)
            self.regularised = config.name == "trgl" and math.isfinite(tau)

    def measure(self, x: Tensor, output: BlockOutput) -> Tensor | None:
        """The transport cost of one block, with graph only if it is part of the loss; None if it has none."""
        residuals = output.residuals
        if self.kind == "stage" or not self.measures:
            return None
        if self.kind == "displacement":
            residuals = displacement(x, output.activation) if output.residuals else ()
        if not residuals:
            return None
        with torch.set_grad_enabled(self.regularised and torch.is_grad_enabled()):
            return transport_cost(residuals, self.norm)

    def measure_stage(self, z: Tensor, output: Tensor) -> Tensor | None:
        """||T_k(z) - z||^2 of the whole stage for `kind: stage`; None otherwise."""
        if self.kind != "stage" or not self.measures:
            return None
        with torch.set_grad_enabled(self.regularised and torch.is_grad_enabled()):
            return transport_cost(displacement(z, output), self.norm)

    def task_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy: mean over rows and tokens, label smoothing as configured.

        Args:
            logits: (N, classes), or (N, T, classes).
            target: (N,), or (N, T).
        """
        return cross_entropy(logits, target, self.label_smoothing)

    def local_loss(self, logits: Tensor, target: Tensor, costs: Sequence[Tensor]) -> LocalLoss:
        """Task loss plus weighted transport cost of the blocks in `costs`; does not touch the multiplier."""
        task = self.task_loss(logits, target)
        by_block = tuple(cost.detach() for cost in costs)
        if not costs:
            return LocalLoss(task, task.detach(), torch.zeros_like(task), ())
        transport = torch.stack(tuple(costs)).sum()
        total = task + self.weight.weighted(transport) if self.regularised else task
        return LocalLoss(total, task.detach(), transport.detach(), by_block)

    def observed_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The task loss as a multiplier shall see it, before the step's loss is weighted with it; without graph."""
        with torch.no_grad():
            smoothing = 0.0 if self.unsmoothed else self.label_smoothing
            return cross_entropy(logits, target, smoothing)

    @property
    def adapts(self) -> bool:
        """Whether the multiplier observes anything; saves a cross-entropy a step where it has none."""
        return isinstance(self.weight, MultiplierWeight)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Over all rows, and all their tokens where there are any; in the form that is deterministic on every device."""
    return F.cross_entropy(
        logits.flatten(0, -2), target.flatten(), label_smoothing=label_smoothing, reduction=reduction
    )


def displacement(x: Tensor, y: Tensor) -> tuple[Residual, ...]:
    """r = T(x) - x as a residual; nothing where the shapes differ."""
    return (Residual.of(_wide(y) - _wide(x)),) if x.shape == y.shape else ()


def stage_taus(config: TransportConfig, num_stages: int) -> tuple[float, ...]:
    """tau of every stage: the scalar, the list, or the half rule (stages i < K // 2 use tau / 2).

    Source: the authors' code, with the half rule also defined for odd K.
    """
    if isinstance(config.tau, list):
        assert len(config.tau) == num_stages
        return tuple(config.tau)
    early = config.tau / 2 if config.half_rule else config.tau
    return tuple(early if stage < num_stages // 2 else config.tau for stage in range(num_stages))
