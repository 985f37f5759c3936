"""The timeline: who computed, sent and waited when, from the Chrome trace events of one run or of several contenders.

stage 0  F0 B0 F1 B1 F2 B2 ..        one row a worker; what is neither forward, backward nor update
stage 1     F0 B0 F1 B1 F2 ..        is idle, whether the worker sends, waits or stalls
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipetrgl.studies.measurement import Span
from pipetrgl.studies.plots import INK, WIDE, Row, canvas, stage_colours, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interval = tuple[float, float]

PHASE_COLOURS = {  # Okabe and Ito's palette; waiting is nearly the paper, for nothing happens in it
    "forward": "#7cc4ee",
    "backward": "#0072b2",
    "update": "#009e73",
    "other work": "#6b7280",
    "send": "#e69f00",
    "wait": "#e7e9ed",
}
_NUM_BATCHES = 2.5  # of the slowest contender with several workers, in a comparison


@styled
def timeline(events: Sequence[Row], num_stages: int) -> tuple[Figure, int | None] | None:
    """A window of a few micro-batches, one row a worker.

    Returns:
        The figure and the index of the outlined micro-batch (None: spans carry no index); None without spans.
    """
    spans = _spans(events)
    if not spans:
        return None
    names = {
        event["pid"]: str(event["args"]["name"])
        for event in events
        if event.get("ph") == "M" and event.get("name") == "process_name"
    }
    (start, end), chosen = _window(spans)
    workers = sorted({event["pid"] for event in spans})
    row_of = {worker: row for row, worker in enumerate(workers)}
    figure, axes = canvas(WIDE, 1.0 + (0.42 if len(workers) <= 8 else 0.3) * len(workers))
    axes.grid(False)
    bars = _bars(axes, spans, row_of, (start, end))
    _number_forwards(axes, spans, row_of, (start, end))
    if chosen is not None:
        _outline(axes, spans, row_of, (start, end), chosen)
    colours = stage_colours(num_stages)
    for worker in workers:
        idle = idle_share(spans, worker, (start, end))
        beside = axes.get_yaxis_transform()
        axes.text(1.008, row_of[worker], f"idle {100 * idle:.0f} %", fontsize=8.5, va="center", transform=beside)
        stage = re.match(r"stage (\d+)", names.get(worker, ""))
        if stage and int(stage[1]) < num_stages:
            look: dict[str, Any] = {"marker": "s", "markersize": 7, "color": colours[int(stage[1])]}
            axes.plot([-0.009], [row_of[worker]], clip_on=False, transform=beside, **look)
    axes.set_yticks(range(len(workers)), [names.get(worker, f"rank {worker}") for worker in workers])
    axes.tick_params(axis="y", length=0, pad=15)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(workers) - 0.5, -0.5)
    axes.set_xlim(0, (end - start) / 1e3)
    axes.set_xlabel("time in the window (ms)")
    _phase_legend(figure, {phase for phase, _ in bars})
    return figure, chosen


@styled
def comparison(traces: Mapping[str, Sequence[Row]]) -> Figure | None:
    """The traces of several contenders below each other, each from the middle of its own, on one scale of time.

    Args:
        traces: the events of each, by its title.
    """
    from matplotlib.figure import Figure

    spans = {title: _spans(events) for title, events in traces.items()}
    spans = {title: some for title, some in spans.items() if some}
    if not spans:
        return None
    workers = {title: sorted({event["pid"] for event in some}) for title, some in spans.items()}
    # one worker alone is so many times slower that it would press the others' batches together
    several = [title for title in spans if len(workers[title]) > 1] or list(spans)
    length = _NUM_BATCHES * max(_period(spans[title]) for title in several)
    rows = [len(some) for some in workers.values()]
    figure = Figure(figsize=(WIDE, 0.75 + 0.27 * sum(rows) + 0.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=[count + 0.2 for count in rows])
    phases: set[str] = set()
    for axes, (title, some) in zip(grid[:, 0], spans.items(), strict=True):
        row_of = {worker: row for row, worker in enumerate(workers[title])}
        window = window_of(some, length)
        axes.grid(False)
        bars = _bars(axes, some, row_of, window)
        phases |= {phase for phase, _ in bars}
        _number_forwards(axes, some, row_of, window)
        for worker, row in row_of.items():
            idle, waits = idle_share(some, worker, window), wait_share(some, worker, window)
            shares = f"idle {100 * idle:.0f} %, waits {100 * waits:.0f} %"
            axes.text(1.008, row, shares, fontsize=8, va="center", transform=axes.get_yaxis_transform())
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=2)
        axes.set_yticks(range(len(row_of)), [f"worker {worker}" for worker in row_of], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(row_of) - 0.5, -0.5)
        axes.set_xlim(0, length / 1e3)
    grid[-1, 0].tick_params(axis="x", length=3)
    grid[-1, 0].set_xlabel("time in the window (ms)")
    _phase_legend(figure, phases)
    return figure


def trace_events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Chrome trace events of what all workers of a turn did, from the first span on; a process a worker."""
    start_s = min(span.start_s for span in spans)
    workers = sorted({span.worker for span in spans})
    names = [
        {"name": "process_name", "ph": "M", "pid": worker, "args": {"name": f"worker {worker}"}} for worker in workers
    ]
    return [
        *names,
        *(
            {
                "name": span.name,
                "cat": span.name if span.name in ("send", "wait") else "compute",
                "ph": "X",
                "ts": round((span.start_s - start_s) * 1e6, 1),
                "dur": round((span.end_s - span.start_s) * 1e6, 1),
                "pid": span.worker,
                "tid": 0,
                "args": {"index": span.batch},
            }
            for span in spans
        ),
    ]


def window_of(spans: Sequence[Row], length: float) -> Interval:
    """A stretch of microseconds that begins with a batch, from the middle of the trace or, if that is too late to fit,
    from before it; shorter where the trace is."""
    end = max(_interval(event)[1] for event in spans)
    starts: dict[int | None, float] = {}
    for event in spans:
        if _computes(_phase(event)):
            starts[_index(event)] = min(float(event["ts"]), starts.get(_index(event), float("inf")))
    begins = sorted(starts.values()) or [float(spans[0]["ts"])]
    early = [start for start in begins[: len(begins) // 2 + 1] if start + length <= end]
    start = early[-1] if early else begins[0]
    return start, min(start + length, end)


def idle_share(spans: Sequence[Row], worker: int, window: Interval) -> float:
    """Share of the window in which a worker neither computes forward or backward passes nor updates."""
    return 1 - _share([event for event in spans if event["pid"] == worker and _computes(_phase(event))], window)


def wait_share(spans: Sequence[Row], worker: int, window: Interval) -> float:
    """Share of the window in which a worker waits to receive or to send, which is a part of its idle time."""
    return _share([event for event in spans if event["pid"] == worker and not _computes(_phase(event))], window)


def _share(spans: Sequence[Row], window: Interval) -> float:
    start, end = window
    some = [_interval(event) for event in spans]
    inside = [(max(first, start), min(last, end)) for first, last in some if first < end and last > start]
    return _covered(inside) / (end - start)


def _period(spans: Sequence[Row]) -> float:
    """Between two batches, as the worker with the fewest of them sees it."""
    firsts: dict[Any, dict[int | None, float]] = defaultdict(dict)
    for event in spans:
        if event["name"] == "forward":
            mine = firsts[event["pid"]]
            mine[_index(event)] = min(float(event["ts"]), mine.get(_index(event), float("inf")))
    gaps = [
        statistics.median(after - before for before, after in itertools.pairwise(sorted(mine.values())))
        for mine in firsts.values()
        if len(mine) > 1
    ]
    whole = max(_interval(event)[1] for event in spans) - min(_interval(event)[0] for event in spans)
    return max(gaps, default=whole)


def _spans(events: Sequence[Row]) -> list[Row]:
    return [event for event in events if event.get("ph") == "X" and event["dur"] > 0]


def _bars(
    axes: Axes, spans: Sequence[Row], row_of: Mapping[Any, int], window: Interval
) -> dict[tuple[str, int], list[Interval]]:
    """Draw a bar for each span in the window; by phase and worker."""
    start, end = window
    bars: dict[tuple[str, int], list[Interval]] = defaultdict(list)
    for event in spans:
        first, last = _interval(event)
        if first < end and last > start:
            bars[_phase(event), event["pid"]].append((max(first, start), min(last, end)))
    for phase, colour in reversed(PHASE_COLOURS.items()):
        for worker, row in row_of.items():
            pieces = [((first - start) / 1e3, (last - first) / 1e3) for first, last in bars.get((phase, worker), [])]
            if pieces:
                edge = "white" if phase != "wait" else "none"
                axes.broken_barh(pieces, (row - 0.39, 0.78), facecolor=colour, edgecolor=edge, linewidth=0.4)
    return bars


def _phase_legend(figure: Figure, phases: set[str]) -> None:
    from matplotlib.patches import Patch

    shown = [phase for phase in PHASE_COLOURS if phase in phases]
    figure.legend(
        [Patch(facecolor=PHASE_COLOURS[phase]) for phase in shown],
        shown,
        loc="outside upper left",
        ncols=len(shown),
        handlelength=1.1,
        handleheight=0.9,
    )


def _interval(event: Row) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _index(event: Row) -> int | None:
    index: int | None = (event.get("args") or {}).get("index")
    return index


def _phase(event: Row) -> str:
    if event.get("cat") in ("send", "wait"):
        return str(event["cat"])
    return event["name"] if event["name"] in ("forward", "backward", "update") else "other work"


def _computes(phase: str) -> bool:
    return phase not in ("send", "wait")


def _covered(spans: Iterable[Interval]) -> float:
    """Length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return total


def _window(spans: Sequence[Row]) -> tuple[Interval, int | None]:
    """The stretch in which one micro-batch, from the middle of the trace, passes all stages; 4 to 12 periods of it."""
    whole = min(_interval(event)[0] for event in spans), max(_interval(event)[1] for event in spans)
    starts: dict[Any, list[float]] = defaultdict(list)
    forwards: dict[int, set[Any]] = defaultdict(set)
    trained: set[int] = set()
    for event in spans:
        index = _index(event)
        if event["name"] == "forward":
            starts[event["pid"]].append(float(event["ts"]))
            if index is not None:
                forwards[index].add(event["pid"])
        elif event["name"] == "backward" and index is not None:
            trained.add(index)
    gaps = [second - first for some in starts.values() for first, second in itertools.pairwise(sorted(some))]
    if not gaps or not forwards:
        return whole, None
    period = statistics.median(gaps)
    widest = max(len(workers) for workers in forwards.values())
    complete = sorted(index for index, workers in forwards.items() if len(workers) == widest)
    candidates = [index for index in complete if index in trained] or complete
    chosen = candidates[len(candidates) // 2]
    path = [_interval(event) for event in spans if _index(event) == chosen and _computes(_phase(event))]
    first, last = min(start for start, _ in path), max(end for _, end in path)
    length = min(max(last - first, 4 * period), 12 * period)
    start = max(first - 0.5 * period, whole[0])
    return (start, min(start + length + period, whole[1])), chosen


def _number_forwards(axes: Axes, spans: Sequence[Row], row_of: Mapping[Any, int], window: Interval) -> None:
    """The micro-batch's index on every forward box that is wide enough for it."""
    start, end = window
    for event in spans:
        first, last = _interval(event)
        index = _index(event)
        if event["name"] != "forward" or index is None or first < start or last > end:
            continue
        digits = (0.05 + 0.065 * len(str(index))) * (end - start) / (WIDE - 2.2)  # inches of paper, as time
        if last - first > digits:
            middle = ((first + last) / 2 - start) / 1e3
            axes.text(middle, row_of[event["pid"]], str(index), fontsize=7, ha="center", va="center")


def _outline(axes: Axes, spans: Sequence[Row], row_of: Mapping[Any, int], window: Interval, chosen: int) -> None:
    """A frame around each span of one micro-batch's computing, and a line from each stage's forward to the next's."""
    from matplotlib.patches import Rectangle

    start, end = window
    stops: list[tuple[float, float, int]] = []
    for event in spans:
        first, last = _interval(event)
        if _index(event) != chosen or event["name"] not in ("forward", "backward") or last <= start or first >= end:
            continue
        left, right, row = (max(first, start) - start) / 1e3, (min(last, end) - start) / 1e3, row_of[event["pid"]]
        frame = Rectangle((left, row - 0.39), right - left, 0.78, fill=False, edgecolor=INK, linewidth=1.3, zorder=4)
        axes.add_patch(frame)
        if event["name"] == "forward":
            stops.append((left, right, row))
    stops.sort()
    for (_, left, upper), (right, _, lower) in itertools.pairwise(stops):
        if lower == upper + 1 and right >= left:  # replicas of a stage overlap in time; they hand nothing on
            axes.plot([left, right], [upper + 0.39, lower - 0.39], color=INK, linewidth=1.0, zorder=4)
