"""Replica groups: the workers that hold the same stage add tensors up, with the same bits for each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipetrgl.channels.alarm import Alarm, wait_until
from pipetrgl.channels.contracts import ReplicaGroup, Sum
from pipetrgl.channels.link import lost_if_broken
from pipetrgl.errors import StalledError

_POLL_S = 1e-4  # an all-reduce of a few bytes takes twice as long


def add_up(group: ReplicaGroup, tensor: Tensor) -> Tensor:
    """The tensor after it has become the sum over the group, in place; waits."""
    group.start_sum(tensor).wait()
    return tensor


def any_replica(group: ReplicaGroup, flag: bool) -> bool:
    """Whether it is true for any of them; waits."""
    if group.num_replicas == 1:
        return flag
    return bool(add_up(group, torch.tensor([float(flag)])))


def summed(group: ReplicaGroup, numbers: Sequence[float]) -> list[float]:
    """Each number's sum over the group; waits."""
    if group.num_replicas == 1:
        return list(numbers)
    totals: list[float] = add_up(group, torch.tensor(numbers, dtype=torch.float64)).tolist()
    return totals


@final
class Agreed:
    """An event that is set once it is set for any replica, and for all of them at the same question.

    Args:
        event: this replica's own.
        group: all of which ask equally often.
    """

    def __init__(self, event: threading.Event, group: ReplicaGroup) -> None:
        self._event = event
        self._group = group

    def is_set(self) -> bool:
        return any_replica(self._group, self._event.is_set())


@final
class LinkGroup:
    """Replicas in processes of their own, over a process group (gloo: a ring, in which every sum is made once).

    Args:
        group: of all replicas and nobody else, ranked by replica, on the CPU.
        device_group: the same over NCCL, for tensors on a GPU; its sums are waited for by the stream, not by the host.
        replica, num_replicas: this worker's place.
        alarm: ends every wait.
        timeout_s: the longest wait.
        name: "the replicas of stage 1", for messages.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device_group: ProcessGroup | None,
        replica: int,
        num_replicas: int,
        alarm: Alarm,
        timeout_s: float,
        name: str,
    ) -> None:
        self.replica = replica
        self.num_replicas = num_replicas
        self._group = group
        self._device_group = device_group
        self._alarm = alarm
        self._timeout_s = timeout_s
        self._name = name

    def start_sum(self, tensor: Tensor) -> Sum:
        if tensor.is_cuda:
            assert self._device_group is not None
            return _StreamSum(self._device_group.allreduce([tensor]))
        with lost_if_broken(self._name):
            return _LinkSum(self._group.allreduce([tensor]), self._alarm, self._timeout_s, self._name)


@final
class _LinkSum:
    def __init__(self, work: Any, alarm: Alarm, timeout_s: float, name: str) -> None:
        self._work = work
        self._alarm = alarm
        self._timeout_s = timeout_s
        self._name = name

    def wait(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._work.is_completed():
            self._alarm.check()
            if time.monotonic() > deadline:
                raise StalledError(f"waited {self._timeout_s:.0f} s for {self._name} to add up their gradients")
            time.sleep(_POLL_S)
        with lost_if_broken(self._name):
            self._work.wait(timedelta(seconds=1))  # done: raises where it failed


@final
class _StreamSum:
    """On a GPU: the current stream waits, the host goes on."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


@final
class ThreadGroup:
    """Where the replicas of one stage, threads of one process, meet; `member` gives each its own side."""

    def __init__(self, num_replicas: int, alarm: Alarm, timeout_s: float) -> None:
        self._num_replicas = num_replicas
        self._alarm = alarm
        self._timeout_s = timeout_s
        self._condition = threading.Condition()
        self._sums: dict[int, dict[int, Tensor]] = {}  # number of the sum -> replica -> what it adds

    def member(self, replica: int) -> ReplicaGroup:
        return _ThreadMember(self, replica, self._num_replicas)

    def add_up(self, number: int, replica: int, tensor: Tensor) -> None:
        with self._condition:
            terms = self._sums.setdefault(number, {})
            terms[replica] = tensor.clone()
            self._condition.notify_all()
            everybody = self._num_replicas
            wait_until(
                self._condition, lambda: len(terms) == everybody, self._alarm, self._timeout_s, "the other replicas"
            )
            # whoever is here has seen the sum before complete, so nobody needs it any more
            self._sums.pop(number - 1, None)
        total = terms[0].clone()
        for other in range(1, everybody):
            total += terms[other]
        tensor.copy_(total)


@final
class _ThreadMember:
    def __init__(self, group: ThreadGroup, replica: int, num_replicas: int) -> None:
        self.replica = replica
        self.num_replicas = num_replicas
        self._group = group
        self._count = 0

    def start_sum(self, tensor: Tensor) -> Sum:
        self._group.add_up(self._count, self.replica, tensor)
        self._count += 1
        return _Done()


@final
class _Done:
    def wait(self) -> None:
        pass
