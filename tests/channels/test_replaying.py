"""What a stage of the replay order takes while the stage before it is late, on timelines drawn by hand."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator

import pytest
import torch

from pipetrgl.channels import replaying
from pipetrgl.channels.replaying import ReplayingInbox
from pipetrgl.microbatch import MicroBatch, Split
from tests.contracts.test_channels import micro_batch


class Scripted:
    """An inbox with one slot, which it fills anew for each arrival.

    Args:
        timeline: a letter for an arrival, a dot for a moment in which nothing has arrived: asked then, it is late.
        arrivals: by their letter.
    """

    waited_s = 0.0

    def __init__(self, timeline: str, arrivals: dict[str, MicroBatch]) -> None:
        self._timeline = list(timeline)
        self._arrivals = arrivals
        self._slot: dict[torch.Size, torch.Tensor] = {}

    @property
    def is_late(self) -> bool:
        late = self._timeline[:1] == ["."]
        if late:
            del self._timeline[0]
        return late

    def __iter__(self) -> Iterator[MicroBatch]:
        while self._timeline:
            moment = self._timeline.pop(0)
            if moment != ".":  # a dot that nobody asked in was waited for
                arrived = self._arrivals[moment]
                assert isinstance(arrived.activation, torch.Tensor)
                slot = self._slot.setdefault(arrived.activation.shape, arrived.activation.clone())
                yield arrived.carrying(slot.copy_(arrived.activation))

    def close(self) -> None:
        pass


def arrivals() -> dict[str, MicroBatch]:
    """Training micro-batches a to y, z the last of all; an evaluation of two: ( and )."""
    batches = {chr(ord("a") + index): micro_batch(index) for index in range(26)}
    batches["z"] = dataclasses.replace(batches["z"], closes_phase=True)
    for letter in "()":
        batches[letter] = dataclasses.replace(micro_batch(99), split=Split.VALID, closes_split=letter == ")")
    return batches


def taken(timeline: str, size: int = 8, max_reuse: int = 2) -> str:
    """What the stage takes, reused micro-batches as capitals; it overwrites all that it is given."""
    letters = {batch.index: letter for letter, batch in arrivals().items() if letter not in "()"}
    seen = ""
    for got in ReplayingInbox(Scripted(timeline, arrivals()), size, max_reuse):
        if got.split is Split.VALID:
            assert not got.reused
            seen += ")" if got.closes_split else "("
            continue
        assert isinstance(got.activation, torch.Tensor)
        assert torch.equal(got.activation, micro_batch(got.index).activation)
        got.activation.zero_()
        seen += letters[got.index].upper() if got.reused else letters[got.index]
    return seen


@pytest.mark.parametrize(
    ("timeline", "size", "max_reuse", "expected"),
    [
        ("ab..cd..", 2, 2, "abBAcdDC"),  # the drawing in channels/replaying.py
        ("abc..d..", 8, 2, "abcCBdDA"),  # the newest of the least used: d, then a, which no one had taken again yet
        ("abc..d..", 2, 2, "abcCBdD"),  # a ring of two has forgotten a by then
        ("a..b...", 8, 3, "aAAbBB"),
        ("ab.c.d.", 8, 2, "abBcCdD"),
        ("a..b", 8, 1, "ab"),  # nothing may be used twice
        ("a.....b", 8, 2, "aAb"),  # used up: it waits
        (".a", 8, 2, "a"),  # nothing has arrived yet
        ("abcd", 1, 9, "abcd"),  # nothing is ever late
    ],
)
def test_the_least_used_and_the_newest_among_them_fills_a_wait(
    timeline: str, size: int, max_reuse: int, expected: str
) -> None:
    assert taken(timeline, size, max_reuse) == expected


def test_an_evaluation_is_not_interrupted_and_not_kept() -> None:
    assert taken("a(.).") == "a()A"
    assert taken("(.)..a.") == "()aA"


def test_nothing_is_reused_after_the_last_training_micro_batch() -> None:
    assert taken("a.z.(.).(.).") == "aAz()()"


def test_the_ring_holds_no_more_than_its_size_and_the_one_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[torch.Tensor]] = []
    copied = replaying.copied

    def counted(micro_batch: MicroBatch) -> MicroBatch:
        copy = copied(micro_batch)
        assert isinstance(copy.activation, torch.Tensor)
        copies.append(weakref.ref(copy.activation))
        return copy

    monkeypatch.setattr(replaying, "copied", counted)
    most = 0
    for got in ReplayingInbox(Scripted("abc.d..efg.h....ijkl..", arrivals()), size=3, max_reuse=4):
        most = max(most, sum(copy() is not None for copy in copies))
        del got
    assert most == 3 + 1
