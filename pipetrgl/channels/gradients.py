"""Gradients of a replica group: added up in buckets, each as soon as the backward pass is done with it.

backward ──────────────────────▶ update
last layer's gradients, .., first layer's
└─ bucket 0 ─┘└─ bucket 1 ─┘└─ 2 ─┘
       sum 0 ═══▶ sum 1 ═══▶ sum 2 ═▶        on the links, beside the backward pass
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from pipetrgl.channels.contracts import ReplicaGroup, Sum

MAX_BUCKET_BYTES, MIN_BUCKET_BYTES = 4 * 2**20, 64 * 2**10
NUM_BUCKETS = 4
"""At the least, for only what comes before the last one travels beside the backward pass; small ones cost latency."""


class GradientSum(Protocol):
    """Makes of each replica's gradients, which are weighted by its share of the rows, those of all rows."""

    def arm(self) -> None:
        """The next backward pass is the step's last."""

    def finish(self) -> None:
        """Return when every gradient is complete."""


@final
class Whole:
    """A lone replica's gradients are of all rows."""

    def arm(self) -> None:
        pass

    def finish(self) -> None:
        pass


@final
class BucketedSum:
    """Over a replica group; all replicas have the same parameters and graph, so they fill their buckets in one order.

    Args:
        group: of two or more.
        parameters: in the order of the forward pass.
        statistics: buffers that each replica has of its own rows, and that become their mean at every update.
        overlap: add a bucket up as soon as it is full, and the statistics when the backward pass begins; else all in
            `finish`.
        bucket_bytes: a bucket is closed when it holds at least so much; None: by the size of all.
    """

    def __init__(
        self,
        group: ReplicaGroup,
        parameters: Sequence[nn.Parameter],
        statistics: Sequence[Tensor],
        overlap: bool = True,
        bucket_bytes: int | None = None,
    ) -> None:
        self._group = group
        self._statistics = tuple(statistics)
        self._means: tuple[Tensor, Sum] | None = None  # of the statistics, on their way
        self._overlap = overlap
        if bucket_bytes is None:
            share = sum(parameter.nbytes for parameter in parameters) // NUM_BUCKETS
            bucket_bytes = min(max(share, MIN_BUCKET_BYTES), MAX_BUCKET_BYTES)
        self._buckets = [_Bucket(part) for part in _portions(list(reversed(parameters)), bucket_bytes)]
        self._next = 0  # bucket to be added up: always in this order, whichever is full first
        self._armed = False
        if overlap:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    ready = functools.partial(self._ready, bucket)
                    parameter.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        self._armed = True
        if self._overlap:
            self._start_means()

    def finish(self) -> None:
        self._armed = False
        if self._means is None:
            self._start_means()
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            bucket.complete()
        self._next = 0
        if self._means is not None:
            total, work = self._means
            work.wait()
            _scatter(total / self._group.num_replicas, self._statistics)
            self._means = None

    def _ready(self, bucket: _Bucket, parameter: Tensor) -> None:
        """One more gradient of the bucket is complete on this replica."""
        if not self._armed:
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start_next()

    def _start_means(self) -> None:
        if self._statistics:
            total = torch.cat([buffer.reshape(-1) for buffer in self._statistics])
            self._means = total, self._group.start_sum(total)

    def _start_next(self) -> None:
        self._buckets[self._next].start(self._group)
        self._next += 1


@final
class _Bucket:
    """Some parameters whose gradients travel together.

    Attributes:
        missing: gradients that the backward pass at hand has not completed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.missing = len(self.parameters)
        self._flat = torch.empty(0)
        self._work: Sum | None = None

    def start(self, group: ReplicaGroup) -> None:
        if gradients := self._gradients():
            self._flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._work = group.start_sum(self._flat)

    def complete(self) -> None:
        self.missing = len(self.parameters)
        if self._work is None:
            return
        self._work.wait()
        _scatter(self._flat, self._gradients())
        self._flat, self._work = torch.empty(0), None

    def _gradients(self) -> list[Tensor]:
        """Parameters that the loss does not reach have none, on no replica."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _portions(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    portion: list[nn.Parameter] = []
    for parameter in parameters:
        portion.append(parameter)
        if sum(one.nbytes for one in portion) >= bucket_bytes:
            yield portion
            portion = []
    if portion:
        yield portion
