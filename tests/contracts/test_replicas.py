"""One suite that every replica group must pass: threads of one process, and process groups over gloo."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.c10d import gloo_group
from pipetrgl.channels.contracts import ReplicaGroup
from pipetrgl.channels.gradients import BucketedSum
from pipetrgl.channels.replicas import Agreed, LinkGroup, ThreadGroup, add_up, any_replica, summed
from pipetrgl.errors import StalledError

T = TypeVar("T")
Open = Callable[..., list[ReplicaGroup]]


def open_threads(size: int, alarm: Alarm, timeout_s: float = 20.0) -> list[ReplicaGroup]:
    group = ThreadGroup(size, alarm, timeout_s)
    return [group.member(replica) for replica in range(size)]


def open_gloo(size: int, alarm: Alarm, timeout_s: float = 20.0) -> list[ReplicaGroup]:
    store = HashStore()
    groups = together(size, lambda replica: gloo_group(store, replica, size, "127.0.0.1", 20.0))
    return [
        LinkGroup(groups[replica], None, replica, size, alarm, timeout_s, "the replicas") for replica in range(size)
    ]


def together(size: int, work: Callable[[int], T]) -> dict[int, T]:
    """What `work` gives for each replica, all at the same time."""
    results: dict[int, T] = {}

    def run(replica: int) -> None:
        results[replica] = work(replica)

    threads = [threading.Thread(target=run, args=(replica,)) for replica in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == size
    return results


@pytest.fixture(params=[open_threads, open_gloo], ids=["threads", "gloo"])
def open_group(request: pytest.FixtureRequest) -> Open:
    opened: Open = request.param
    return opened


def test_every_replica_gets_the_same_bits_of_every_sum(open_group: Open) -> None:
    groups = open_group(3, Alarm())
    terms = [torch.randn(5, 1000, generator=torch.Generator().manual_seed(replica)) for replica in range(3)]
    results = together(3, lambda j: [add_up(groups[j], row.clone()) for row in terms[j]])
    for row in range(5):
        assert results[0][row].equal(results[1][row])
        assert results[0][row].equal(results[2][row])
        torch.testing.assert_close(results[0][row], terms[0][row] + terms[1][row] + terms[2][row])


def test_sums_may_be_under_way_at_the_same_time(open_group: Open) -> None:
    groups = open_group(2, Alarm())

    def work(replica: int) -> list[float]:
        tensors = [torch.tensor([10.0 * number + replica]) for number in range(3)]
        sums = [groups[replica].start_sum(tensor) for tensor in tensors]
        for one in sums:
            one.wait()
        return [float(tensor) for tensor in tensors]

    assert together(2, work) == {0: [1.0, 21.0, 41.0], 1: [1.0, 21.0, 41.0]}


def test_replicas_agree_once_any_of_them_says_so(open_group: Open) -> None:
    groups, events = open_group(2, Alarm()), [threading.Event(), threading.Event()]
    events[1].set()
    assert together(2, lambda j: any_replica(groups[j], j == 1)) == {0: True, 1: True}
    assert together(2, lambda j: any_replica(groups[j], False)) == {0: False, 1: False}
    assert together(2, lambda j: Agreed(events[j], groups[j]).is_set()) == {0: True, 1: True}
    assert together(2, lambda j: summed(groups[j], [1.0, float(j)])) == {0: [2.0, 1.0], 1: [2.0, 1.0]}


def test_a_replica_that_never_comes_ends_the_wait(open_group: Open) -> None:
    groups = open_group(2, Alarm(), timeout_s=0.3)
    with pytest.raises(StalledError, match="waited 0 s for the .*replicas"):
        add_up(groups[0], torch.zeros(1))


def test_the_alarm_ends_the_wait(open_group: Open) -> None:
    alarm = Alarm()
    groups = open_group(2, alarm)
    alarm.ring(ValueError("elsewhere"))
    with pytest.raises(ValueError, match="elsewhere"):
        add_up(groups[0], torch.zeros(1))


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_become_those_of_all_rows(open_group: Open, overlap: bool) -> None:
    """Two replicas with 1 and 3 of 4 rows, one tensor a bucket; the unused layer has no gradient on either."""
    groups = open_group(2, Alarm())
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    start = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)])

    def loss(model: nn.ModuleList, x: Tensor) -> Tensor:
        return torch.as_tensor(model[1](model[0](x).relu()).square().mean() * (len(x) / 4))

    whole = copy.deepcopy(start)
    loss(whole, rows).backward()

    def work(replica: int) -> list[Tensor | None]:
        model = copy.deepcopy(start)
        buffer = torch.tensor([float(replica)])
        total = BucketedSum(groups[replica], list(model.parameters()), [buffer], overlap, bucket_bytes=1)
        for _ in range(2):  # the second step starts from nothing again
            model.zero_grad()
            total.arm()
            loss(model, rows[:1] if replica == 0 else rows[1:]).backward()
            total.finish()
        assert float(buffer) == 0.5
        return [parameter.grad for parameter in model.parameters()]

    results = together(2, work)
    for mine, theirs, expected in zip(results[0], results[1], whole.parameters(), strict=True):
        if expected.grad is None:
            assert mine is None
            continue
        assert mine is not None
        assert theirs is not None
        assert mine.equal(theirs)
        torch.testing.assert_close(mine, expected.grad)
