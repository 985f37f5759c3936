"""What parts of a network and a link cost, as measured: the numbers that a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final


@final
@dataclass(frozen=True)
class Cost:
    """Of one micro-batch on one worker; costs of neighbours on one stage add up.

    Attributes:
        forward_s, backward_s: grow with the rows, so replicas share them.
        update_s: of the optimizer, every replica's own; divided by the micro-batches of a step.
        saved_bytes: kept from the forward for the backward pass, the output included and the input not.
        state_bytes: weights, buffers, gradients and what the optimizer remembers.
        gradient_bytes: what replicas average.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    saved_bytes: int = 0
    state_bytes: int = 0
    gradient_bytes: int = 0

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_s + other.forward_s,
            self.backward_s + other.backward_s,
            self.update_s + other.update_s,
            self.saved_bytes + other.saved_bytes,
            self.state_bytes + other.state_bytes,
            self.gradient_bytes + other.gradient_bytes,
        )

    def scaled(self, rows: float, speed: float) -> Cost:
        """Of `rows` times as many rows on a worker `speed` times as fast."""
        return replace(
            self,
            forward_s=self.forward_s * rows / speed,
            backward_s=self.backward_s * rows / speed,
            update_s=self.update_s / speed,
            saved_bytes=round(self.saved_bytes * rows),
        )


@final
@dataclass(frozen=True)
class UnitCost:
    """Of the blocks between two legal cuts, which always share a stage.

    opening ┌ unit ┐ ┌ unit ┐ ┌ unit ┐      a stage costs: opening of its first unit, inner of the others,
            └──────┘ └─inner┘ └─inner┘ head         and the head behind its last

    Attributes:
        blocks: their names.
        opening: as the first of a stage, where no gradient is computed for the input.
        inner: behind another unit of the same stage.
        head: of an auxiliary head behind it.
        input_bytes: of what comes in, as a worker holds it: activation, and the image where it rides along.
        output_bytes: of the activation that it hands on.
        wire_bytes: of what a link behind it carries, as the codec writes it.
    """

    blocks: tuple[str, ...]
    opening: Cost
    inner: Cost
    head: Cost
    input_bytes: int
    output_bytes: int
    wire_bytes: int

    def scaled(self, rows: float, speed: float) -> UnitCost:
        """Of `rows` times as many rows on a worker `speed` times as fast."""
        return replace(
            self,
            opening=self.opening.scaled(rows, speed),
            inner=self.inner.scaled(rows, speed),
            head=self.head.scaled(rows, speed),
            input_bytes=round(self.input_bytes * rows),
            output_bytes=round(self.output_bytes * rows),
            wire_bytes=round(self.wire_bytes * rows),
        )


@final
@dataclass(frozen=True)
class LinkSpeed:
    """latency_s + bytes / bytes_per_s: how long one micro-batch occupies a link.

    Attributes:
        latency_s: of an empty one, header included.
        bytes_per_s: of the payload.
    """

    latency_s: float
    bytes_per_s: float

    def time_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s

    def all_reduce_s(self, num_bytes: float, replicas: int) -> float:
        """2 (R - 1) steps of a ring, each with one R-th of the bytes; nothing for a lone replica."""
        return 2 * (replicas - 1) * self.time_s(num_bytes / replicas) if replicas > 1 else 0.0
