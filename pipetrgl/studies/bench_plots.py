"""The figures of a bench: speed-up against the ideal line, contenders beside each other, waits, predictions, codecs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipetrgl.studies.bench_results import ON_ALL_WORKERS, kind_of
from pipetrgl.studies.plots import HEIGHT, HIGHLIGHT, INK, NARROW, canvas, stage_colours, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Part = Mapping[str, Any]  # of result.json: a point, or a contender at a point

COLOURS = {  # Okabe and Ito's palette, and greys
    "pipetrgl": HIGHLIGHT,
    "independent": "#6b7280",
    "serial": "#98a2b3",
    "end_to_end": "#0072b2",
    "end_to_end/threads2": "#56b4e9",
    "ddp": "#009e73",
    "gpipe": "#e69f00",
    "1f1b": "#cc79a7",
    "interleaved_1f1b": "#8a4b00",
    "zero_bubble": "#4b0082",
    "zero_bubble_v": "#7c3aed",
}
_IDEAL: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 2)), "linewidth": 1.1}
_MAX_LINES = 6


def colour_of(contender: str) -> str:
    """The same in every figure; a stage alone has a grey."""
    kind = kind_of(contender)
    return COLOURS.get("end_to_end/threads2" if kind.startswith("end_to_end/") else kind, "#b6bdc8")


def found(point: Part, contender: str) -> Part | None:
    """A contender at a point; None if it was not there, or got through no round."""
    return next((one for one in point["contenders"] if one["contender"] == contender and one["images_per_s"]), None)


@styled
def speed_up(points: Sequence[Part]) -> Figure | None:
    """Over the serial loop of the same stages, by workers, with the ideal line; bars are quartiles.

    Args:
        points: of one line of the grid, which differ in their workers.
    Returns:
        None without the serial loop.
    """
    if not any((one := found(point, "pipetrgl")) and one["speed_up"] for point in points):
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    workers = [point["workers"] for point in points]
    axes.plot([1, max(workers)], [1, max(workers)], label="ideal", **_IDEAL)
    for name in _compared(points):
        _line(axes, points, name)
    predicted = [_predicted_speed_up(point) for point in points]
    known = [(count, value) for count, value in zip(workers, predicted, strict=True) if value is not None]
    axes.plot(
        [count for count, _ in known], [value for _, value in known], color=HIGHLIGHT, linestyle=(0, (4, 2)),
        linewidth=1.1, marker="D", markersize=5, markerfacecolor="white", label="pipetrgl, predicted",
    )  # fmt: skip
    _over_workers(axes, workers)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images/s over the serial loop's")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def efficiency(points: Sequence[Part]) -> Figure | None:
    """Speed-up divided by the workers, in per cent; arguments and None as of `speed_up`."""
    if not any((one := found(point, "pipetrgl")) and one["speed_up"] for point in points):
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    workers = [point["workers"] for point in points]
    axes.axhline(100, label="ideal", **_IDEAL)
    for name in _compared(points):
        if kind_of(name) in ON_ALL_WORKERS:
            _line(axes, points, name, per_worker=True)
    _over_workers(axes, workers)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("efficiency (%)")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def rates(point: Part) -> Figure | None:
    """Images a second of each contender: the median, quartiles as a whisker, and what was predicted as a diamond."""
    shown = [one for one in point["contenders"] if one["images_per_s"]]
    if not shown:
        return None
    figure, axes = canvas(NARROW, 0.75 + 0.27 * len(shown))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    for row, one in enumerate(shown):
        median, low, high = (one["images_per_s"][key] for key in ("median", "low", "high"))
        axes.barh(row, median, height=0.66, color=colour_of(one["contender"]))
        axes.plot([low, high], [row, row], color=INK, linewidth=1.3)
        beside = max(high, one["predicted_images_per_s"] or 0)
        axes.annotate(f"{median:,.1f}", (beside, row), (6, 0), textcoords="offset points", va="center", fontsize=8)
        if one["predicted_images_per_s"] is not None:
            axes.plot(
                [one["predicted_images_per_s"]], [row], marker="D", markersize=5, markerfacecolor="white", color=INK
            )
    axes.set_yticks(range(len(shown)), [one["contender"] for one in shown], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
    axes.set_xlabel("images/s")
    return figure


@styled
def waits(contenders: Sequence[Part], num_workers: int) -> Figure | None:
    """Share of the time that each worker of each contender waited to receive or to send; a bar a worker.

    Returns:
        None where none of those that use all workers knows it.
    """
    shown = [
        one
        for one in contenders
        if kind_of(one["contender"]) in ON_ALL_WORKERS and any(share is not None for share in one["wait_share"])
    ]
    if not shown:
        return None
    colours = stage_colours(num_workers)
    height = 0.8 / num_workers
    figure, axes = canvas(NARROW, 0.95 + max(0.27, 0.13 * num_workers) * len(shown))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    for row, one in enumerate(shown):
        for worker, share in enumerate(one["wait_share"]):
            place = row - 0.4 + (worker + 0.5) * height
            if share is not None:
                label = f"worker {worker}" if row == 0 and num_workers <= _MAX_LINES else None
                axes.barh(place, 100 * share, height=0.9 * height, color=colours[worker], label=label)
    axes.set_yticks(range(len(shown)), [one["contender"] for one in shown], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, 1.05 * axes.get_xlim()[1]))
    axes.set_xlabel("time waited (%)")
    if num_workers <= _MAX_LINES:
        figure.legend(loc="outside upper left", ncols=num_workers)
    return figure


@styled
def predictions(points: Sequence[Part]) -> Figure | None:
    """Measured over predicted images a second, on the diagonal where the prediction was right."""
    kinds: dict[str, list[tuple[float, Part]]] = {"pipetrgl": [], "serial": [], "stage alone": []}
    for point in points:
        for one in point["contenders"]:
            if one["images_per_s"] and one["predicted_images_per_s"]:
                kind = one["contender"] if one["contender"] in kinds else "stage alone"
                kinds[kind].append((one["predicted_images_per_s"], one["images_per_s"]))
    some = [pair for pairs in kinds.values() for pair in pairs]
    if not some:
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    top = 1.1 * max(max(predicted, measured["high"]) for predicted, measured in some)
    axes.plot([0, top], [0, top], label="as predicted", **_IDEAL)
    for (kind, pairs), marker in zip(kinds.items(), "Dos", strict=True):
        if pairs:
            middle = [measured["median"] for _, measured in pairs]
            down = [measured["median"] - measured["low"] for _, measured in pairs]
            up = [measured["high"] - measured["median"] for _, measured in pairs]
            axes.errorbar(
                [predicted for predicted, _ in pairs], middle, yerr=[down, up], linestyle="none", marker=marker,
                markersize=5, color=colour_of(kind), label=kind, elinewidth=1.0,
            )  # fmt: skip
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("predicted images/s")
    axes.set_ylabel("measured images/s")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


@styled
def by_codec(points: Sequence[Part]) -> Figure | None:
    """What pipetrgl's links carry for one batch, and its images a second, by codec."""
    shown = [(point["codec"], one) for point in points if (one := found(point, "pipetrgl"))]
    if len(shown) < 2:
        return None
    return _two_bars(
        [codec for codec, _ in shown],
        ([sum(one["sent_bytes_per_batch"]) / 1e6 for _, one in shown], "MB on all links, a batch"),
        [one["images_per_s"] for _, one in shown],
    )


@styled
def by_capacity(points: Sequence[Part]) -> Figure | None:
    """How long pipetrgl's worst worker waits, and its images a second, by the slots of a link."""
    shown = [(point["capacity"], one) for point in points if (one := found(point, "pipetrgl"))]
    if len(shown) < 2:
        return None
    return _two_bars(
        [str(capacity) for capacity, _ in shown],
        (
            [100 * max((share for share in one["wait_share"] if share is not None), default=0) for _, one in shown],
            "longest wait of a worker (%)",
        ),
        [one["images_per_s"] for _, one in shown],
    )


def best_schedules(point: Part) -> list[str]:
    """Of each of torch's schedules the fastest number of micro-batches, the fastest schedule first."""
    some = [one for one in point["contenders"] if one["images_per_s"] and kind_of(one["contender"]) != one["contender"]]
    some.sort(key=lambda one: float(-one["images_per_s"]["median"]))
    return [
        next(one["contender"] for one in some if kind_of(one["contender"]) == kind)
        for kind in dict.fromkeys(kind_of(one["contender"]) for one in some)
    ]


def _two_bars(names: Sequence[str], left: tuple[Sequence[float], str], rates: Sequence[Part]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(NARROW, HEIGHT), layout="constrained")
    first, second = figure.subplots(1, 2)
    first.bar(names, left[0], width=0.6, color="#e69f00")
    for place, value in enumerate(left[0]):
        first.annotate(f"{value:#.3g}", (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    first.set_ylabel(left[1])
    second.bar(names, [rate["median"] for rate in rates], width=0.6, color=HIGHLIGHT)
    for place, rate in enumerate(rates):
        second.plot([place, place], [rate["low"], rate["high"]], color=INK, linewidth=1.3)
    second.set_ylabel("images/s")
    return figure


def _compared(points: Sequence[Part]) -> list[str]:
    """The contenders that use several workers, and end-to-end training with more threads."""
    names = dict.fromkeys(
        one["contender"]
        for point in points
        for one in point["contenders"]
        if one["speed_up"] and one["contender"] != "serial" and not one["contender"].startswith("stage ")
    )
    schedules = [name for name in names if kind_of(name) != name]
    best = {name for point in points for name in best_schedules(point)[:1]}
    return [name for name in names if name not in schedules or name in best]


def _line(axes: Axes, points: Sequence[Part], name: str, per_worker: bool = False) -> None:
    """One contender's speed-up over the workers, with quartiles."""
    some = [(point["workers"], one["speed_up"]) for point in points if (one := found(point, name)) and one["speed_up"]]
    if not some:
        return
    scale = [100 / count if per_worker else 1.0 for count, _ in some]
    middle = [factor * value["median"] for factor, (_, value) in zip(scale, some, strict=True)]
    down = [factor * (value["median"] - value["low"]) for factor, (_, value) in zip(scale, some, strict=True)]
    up = [factor * (value["high"] - value["median"]) for factor, (_, value) in zip(scale, some, strict=True)]
    mine = name == "pipetrgl"
    axes.errorbar(
        [count for count, _ in some], middle, yerr=[down, up], color=colour_of(name), marker="o", label=name,
        linewidth=2.0 if mine else 1.1, markersize=5 if mine else 3.5, elinewidth=1.0, zorder=3 if mine else 2,
    )  # fmt: skip


def _predicted_speed_up(point: Part) -> float | None:
    rates = {one["contender"]: one["predicted_images_per_s"] for one in point["contenders"]}
    mine, serial = rates.get("pipetrgl"), rates.get("serial")
    return None if mine is None or serial is None else float(mine / serial)


def _over_workers(axes: Axes, workers: Sequence[int]) -> None:
    axes.set_xticks(sorted(set(workers)))
    margin = 0.08 * max(1, max(workers) - 1)
    axes.set_xlim(1 - margin, max(workers) + margin)
    axes.set_xlabel("workers")
