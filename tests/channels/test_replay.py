"""The replay log, on micro-batches of one byte of payload and eight of labels: those of a row without a position."""

from __future__ import annotations

import pytest
import torch

from pipetrgl.channels.replay import ReplayLog, Sent
from pipetrgl.errors import LinkError, ReplayGapError
from pipetrgl.microbatch import MicroBatch, Split


def sent(index: int, step: int = 0, tensor: torch.Tensor | None = None) -> Sent:
    tensor = torch.zeros(1, dtype=torch.uint8) if tensor is None else tensor
    target, positions = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    micro_batch = MicroBatch(tensor, target, positions, Split.TRAIN, 0, step, index, 0, 1, True, False)
    return Sent.now(micro_batch, (tensor,))


def filled(max_bytes: int, count: int = 5) -> ReplayLog:
    log = ReplayLog(max_bytes)
    for index in range(count):
        log.add(sent(index))
    return log


def kept(log: ReplayLog, index: int) -> list[int]:
    return [one.index for one in log.since(index, "stage 1")]


def test_what_was_sent_since_a_micro_batch_is_kept_in_order() -> None:
    log = filled(max_bytes=45)
    assert log.num_bytes == 45
    assert kept(log, 2) == [2, 3, 4]
    assert kept(log, 5) == []


def test_the_oldest_are_let_go_where_there_is_no_room() -> None:
    log = filled(max_bytes=44)  # one byte short of all five
    assert log.num_bytes == 36
    assert kept(log, 1) == [1, 2, 3, 4]
    with pytest.raises(ReplayGapError, match="stage 1 needs micro-batch 0 again, but only 1 and later are kept"):
        log.since(0, "stage 1")


def test_what_the_receiver_has_made_durable_is_let_go() -> None:
    log = filled(max_bytes=1000)
    log.trim(3)
    assert log.num_bytes == 18
    assert kept(log, 3) == [3, 4]
    log.trim(9)
    assert log.num_bytes == 0
    assert kept(log, 5) == []


def test_an_empty_log_without_room_still_knows_what_it_has_let_go() -> None:
    log = filled(max_bytes=0)
    with pytest.raises(ReplayGapError, match="needs micro-batch 4 again, but only 5 and later"):
        log.since(4, "stage 1")
    assert kept(ReplayLog(0), 7) == []


def test_a_kept_tensor_that_was_changed_in_place_is_not_sent_again() -> None:
    tensor = torch.zeros(3)
    one = sent(0, step=12, tensor=tensor)
    one.require_unchanged("stage 1")
    tensor.add_(1)
    with pytest.raises(LinkError, match="step 12: the activation for stage 1 was changed in place"):
        one.require_unchanged("stage 1")
