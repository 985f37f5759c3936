"""The timeline: shares and windows that one counts by hand, and a picture of several contenders."""

from __future__ import annotations

import pytest

from pipetrgl.studies.measurement import Span
from pipetrgl.studies.timeline import comparison, idle_share, trace_events, wait_share, window_of


def spans(worker: int, text: str, start: int = 0) -> list[Span]:
    """One letter a second: F B U S W of forward, backward, update, send, wait; a dot is nothing; F opens a batch."""
    names = {"F": "forward", "B": "backward", "U": "update", "S": "send", "W": "wait"}
    found, batch = [], -1
    for second, letter in enumerate(text, start=start):
        batch += letter == "F"
        if letter != ".":
            found.append(Span(worker, names[letter], second, second + 1, batch))
    return found


def test_idle_is_what_is_not_computed_and_waits_are_a_part_of_it() -> None:
    #             0123456789
    # worker 0    FBU.SWFBU.     in 0 .. 10: computes 6, sends 1, waits 1, nothing 2
    # worker 1    WWFBUWWFBU     in 0 .. 10: computes 6, waits 4
    events = [*spans(0, "FBU.SWFBU."), *spans(1, "WWFBUWWFBU")]
    rows = [event for event in trace_events(events) if event["ph"] == "X"]
    assert idle_share(rows, 0, (0, 10e6)) == pytest.approx(0.4)
    assert wait_share(rows, 0, (0, 10e6)) == pytest.approx(0.2)
    assert idle_share(rows, 1, (0, 10e6)) == pytest.approx(0.4)
    assert wait_share(rows, 1, (0, 10e6)) == pytest.approx(0.4)
    assert idle_share(rows, 0, (3.5e6, 6.5e6)) == pytest.approx(2.5 / 3)  # half of a forward


def test_a_span_counts_once_where_others_overlap_it() -> None:
    events = [Span(0, "wait", 0, 4, 0), Span(0, "wait", 2, 6, 0), Span(0, "forward", 6, 10, 0)]
    rows = [event for event in trace_events(events) if event["ph"] == "X"]
    assert wait_share(rows, 0, (0, 10e6)) == pytest.approx(0.6)


def test_the_window_begins_with_a_batch_in_the_middle_or_earlier_where_it_would_not_fit() -> None:
    rows = [event for event in trace_events(spans(0, "FBFBFBFBFB")) if event["ph"] == "X"]  # batches at 0, 2, 4, 6, 8
    assert window_of(rows, 5e6) == (4e6, 9e6)
    assert window_of(rows, 7e6) == (2e6, 9e6)
    assert window_of(rows, 20e6) == (0, 10e6)


def test_the_picture_has_a_strip_for_each_contender_and_a_row_for_each_worker() -> None:
    pytest.importorskip("matplotlib")
    pipe = trace_events([*spans(0, "FBU" * 8), *spans(1, "FBU" * 8, start=1)])
    serial = trace_events(spans(0, "FFBBU" * 6))
    figure = comparison({"pipetrgl": pipe, "serial": serial, "nothing": []})
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pipetrgl", "serial"]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes] == [
        ["worker 0", "worker 1"],
        ["worker 0"],
    ]
    # 2.5 periods of 3 s, those of the contender with several workers
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim() == (0, 7500)
    assert comparison({"nothing": []}) is None
