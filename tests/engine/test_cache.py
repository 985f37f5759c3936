"""The caches, one suite for both, and the stage that is filled from one."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipetrgl.data.dataset import Indices
from pipetrgl.engine.cache import CACHES, Cache, DiskCache
from pipetrgl.engine.idle import NOTHING
from pipetrgl.engine.recall import RecallingStage
from pipetrgl.errors import LaunchError
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import StageOutput


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    """Of four samples, each of shape (1, 2)."""
    return CACHES[request.param](tmp_path, 4, (1, 2))


def rows(*numbers: float) -> Tensor:
    return torch.tensor([[[number, -number]] for number in numbers])


def places(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_rows_come_back_by_position_in_any_order_and_grouping(cache: Cache) -> None:
    cache.keep(places(3, 0), rows(30.5, 0.25))
    cache.keep(places(1), rows(1e-30))
    assert cache.recall(places(0, 1, 3)).equal(rows(0.25, 1e-30, 30.5))
    assert cache.recall(places(1)).equal(rows(1e-30))


def test_a_later_row_replaces_an_earlier(cache: Cache) -> None:
    cache.keep(places(2, 1), rows(2.0, 1.0))
    cache.keep(places(2), rows(5.0))
    assert cache.recall(places(1, 2)).equal(rows(1.0, 5.0))


def test_what_is_recalled_shares_no_memory_with_what_was_kept_or_is_recalled_again(cache: Cache) -> None:
    given = rows(1.0)
    cache.keep(places(0), given)
    given.zero_()
    cache.recall(places(0)).zero_()
    assert cache.recall(places(0)).equal(rows(1.0))


def test_rows_may_lie_in_memory_in_any_way(cache: Cache) -> None:
    cache.keep(places(0, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]).transpose(1, 2))
    assert cache.recall(places(1)).tolist() == [[[3.0, 4.0]]]


def test_after_forgetting_nothing_can_be_recalled_until_it_is_kept_anew(cache: Cache) -> None:
    cache.forget()
    cache.keep(places(0), rows(1.0))
    cache.forget()
    with pytest.raises(AssertionError, match="nothing was kept"):
        cache.recall(places(0))
    cache.keep(places(1), rows(2.0))
    assert cache.recall(places(1)).equal(rows(2.0))


def files_in(folder: Path) -> list[str]:
    """Open files of this process in `folder`, those without a name included."""
    links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [link for link in links if link.startswith(f"{folder}/")]


def test_the_file_on_disk_has_no_name_and_is_closed_by_forgetting_or_with_the_cache(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 4, (1, 2))
    assert files_in(tmp_path) == []
    for _ in range(2):
        cache.keep(places(0), rows(1.0))
        assert list(tmp_path.iterdir()) == []
        assert len(files_in(tmp_path)) == 1
        cache.forget()
        assert files_in(tmp_path) == []
    cache.keep(places(0), rows(1.0))
    del cache
    gc.collect()
    assert files_in(tmp_path) == []


def test_a_disk_that_cannot_take_or_give_a_row_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, 4, (1, 2))
    with pytest.raises(LaunchError, match=r"train.cache: disk: the file in .* failed: No such file"):
        DiskCache(tmp_path / "gone", 4, (1, 2)).keep(places(0), rows(1.0))
    cache.keep(places(0), rows(1.0))
    with pytest.raises(LaunchError, match="0 of 8 bytes of a row went through; use memory or none"):
        cache.recall(places(3))  # beyond the end of the file
    monkeypatch.setattr(os, "pwrite", lambda file, row, offset: 3)
    with pytest.raises(LaunchError, match="3 of 8 bytes"):
        cache.keep(places(0), rows(1.0))


class Noting:
    """A stage that notes its input."""

    index = 1

    def __init__(self) -> None:
        self.got: list[list[float]] = []

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        assert isinstance(micro_batch.activation, Tensor)
        self.got.append(micro_batch.activation.flatten().tolist())
        return NOTHING

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        pass

    def update(self) -> None:
        pass


class FirstStep:
    """Step 0 is asked for again, no other."""

    def all(self, step: int, positions: Indices) -> bool:
        raise AssertionError("the plan asks this, and sends ticks")

    def again(self, step: int) -> bool:
        return step == 0


def batch(step: int, positions: Tensor, activation: Tensor | None, closes_phase: bool = False) -> MicroBatch:
    return MicroBatch(
        () if activation is None else activation, torch.zeros(len(positions)), positions, Split.TRAIN, 0, step, step, 0,
        len(positions), closes_step=True, closes_split=False, closes_phase=closes_phase,
    )  # fmt: skip


def test_a_stage_keeps_what_is_asked_for_again_and_fills_ticks_with_it(cache: Cache) -> None:
    inner = Noting()
    stage = RecallingStage(inner, FirstStep(), cache)
    stage.forward(batch(0, places(2, 0), rows(2.0, 4.0)), train=True)
    stage.forward(batch(1, places(2, 0), rows(6.0, 8.0)), train=True)  # not kept
    stage.forward(batch(2, places(0, 2), rows(7.0, 7.0)), train=False)  # an evaluation's positions are another split's
    stage.forward(batch(3, places(0, 2), None), train=True)
    assert inner.got == [[2.0, -2.0, 4.0, -4.0], [6.0, -6.0, 8.0, -8.0], [7.0, -7.0, 7.0, -7.0], [4.0, -4.0, 2.0, -2.0]]


def test_with_its_phase_a_stage_forgets_after_it_has_recalled_once_more(cache: Cache) -> None:
    inner = Noting()
    stage = RecallingStage(inner, FirstStep(), cache)
    stage.forward(batch(0, places(1), rows(1.0)), train=True)
    stage.forward(batch(1, places(1), None, closes_phase=True), train=True)
    assert inner.got == [[1.0, -1.0], [1.0, -1.0]]
    with pytest.raises(AssertionError, match="nothing was kept"):
        stage.forward(batch(2, places(1), None), train=True)
