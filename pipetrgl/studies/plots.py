"""The figures of a run's report, drawn from its metrics rows, result and trace."""

from __future__ import annotations

import functools
import html
import io
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Costs = Mapping[int, Mapping[str, float | None]]
"""Of the blocks of each stage."""
P = ParamSpec("P")
R = TypeVar("R")

INK = "#1d2129"
HIGHLIGHT = "#c2410c"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a block or run name may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": "#98a2b3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e7ec",
    "grid.linewidth": 0.7,
    "xtick.color": "#98a2b3",
    "xtick.labelcolor": INK,
    "ytick.color": "#98a2b3",
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.3,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.0,
    "legend.borderpad": 0.0,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "pipetrgl",
}
NARROW, WIDE, HEIGHT = 5.2, 10.7, 3.3  # inches; narrow is half the page, and a phone's width
MAX_POINTS = 300
MAX_STAGE_LABELS = 16
MAX_BLOCK_LABELS = 32


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draws under STYLE and leaves matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def stage_colours(num_stages: int) -> list[str]:
    """One colour a stage, dark to light in the order of the stages; told apart by colour-blind readers too."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    plasma = colormaps["plasma"]
    return [to_hex(plasma(0.82 * stage / max(num_stages - 1, 1))) for stage in range(num_stages)]


def evaluations(rows: Iterable[Row], kind: str) -> dict[int, dict[int, float]]:
    """Accuracy of the heads at every evaluation: step -> stage -> accuracy, steps ascending."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == kind and row.get("accuracy") is not None:
            found[row["step"]][row["stage"]] = row["accuracy"]
    return dict(sorted(found.items()))


@styled
def accuracy_by_stage(rows: Sequence[Row], num_stages: int) -> Figure | None:
    """Accuracy over the stages, one line a validation from faint (early) to strong (last), and the test split.

    Returns:
        None for a single stage, which makes no curve, and where nothing has been evaluated.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    valid, test = evaluations(rows, "valid"), evaluations(rows, "test")
    if num_stages == 1 or not (valid or test):
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    shown = _spread(list(valid), 5)
    for place, step in enumerate(shown):
        strength = (place + 1) / len(shown)
        stages = sorted(valid[step])
        axes.plot(
            stages,
            [100 * valid[step][stage] for stage in stages],
            color=colormaps["Blues"](0.2 + 0.75 * strength),
            marker="o",
            markersize=4,
            linewidth=1.0 + strength,
            label=f"valid, step {step}",
        )
    if test:
        step, heads = list(test.items())[-1]
        stages = sorted(heads)
        axes.plot(
            stages,
            [100 * heads[stage] for stage in stages],
            color=HIGHLIGHT,
            linestyle=(0, (3, 2)),
            linewidth=1.2,
            marker="D",
            markersize=5,
            markerfacecolor="white",
            label=f"test, step {step}",
        )
    axes.set_xlim(-0.4, num_stages - 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=MAX_STAGE_LABELS, min_n_ticks=1))
    axes.set_xlabel("stage of the head")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def accuracy_over_steps(rows: Sequence[Row], num_stages: int) -> Figure | None:
    """Validation accuracy of every head over the optimizer steps."""
    valid = evaluations(rows, "valid")
    if not valid:
        return None
    series: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for step, heads in valid.items():
        for stage, accuracy in heads.items():
            series[stage].append((step, 100 * accuracy))
    figure, axes = canvas(NARROW, HEIGHT)
    _stage_lines(figure, axes, series, num_stages, marker="o" if len(valid) <= 40 else "")
    axes.set_ylabel("validation accuracy (%)")
    return figure


@styled
def training_curve(rows: Sequence[Row], num_stages: int, key: str, label: str, scale: float = 1) -> Figure | None:
    """One training measure over the optimizer steps, one line a stage: the mean of its replicas.

    The axis is logarithmic where the values span a factor of twenty or more.
    """
    measured: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "train" and row.get(key) is not None:
            measured[row["stage"]][row["step"]].append(row[key])
    if not measured:
        return None
    series = {
        stage: _thinned([(float(step), scale * statistics.fmean(replicas)) for step, replicas in sorted(steps.items())])
        for stage, steps in sorted(measured.items())
    }
    figure, axes = canvas(NARROW, HEIGHT)
    _stage_lines(figure, axes, series, num_stages)
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    if scale == 1 and values and min(values) > 0 and max(values) > 20 * min(values):
        _log_axis(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    return figure


@styled
def cost_by_block(costs: Costs, num_stages: int, label: str) -> Figure | None:
    """Bars of a cost of every residual block, in the order of the network, coloured by stage."""
    blocks = [(stage, block, cost) for stage, own in costs.items() for block, cost in own.items() if cost is not None]
    if not blocks:
        return None
    colours = stage_colours(num_stages)
    owners = list(dict.fromkeys(owner for owner, _, _ in blocks))
    # Half a bar of air between two stages shows where the network is cut.
    places = [index + 0.5 * owners.index(owner) for index, (owner, _, _) in enumerate(blocks)]
    figure, axes = canvas(NARROW, HEIGHT)
    axes.bar(places, [cost for _, _, cost in blocks], width=0.8, color=[colours[owner] for owner, _, _ in blocks])
    if len(blocks) <= 12:
        for place, (_, _, cost) in zip(places, blocks, strict=True):
            axes.annotate(f"{cost:#.2g}", (place, cost), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    every = -(-len(blocks) // MAX_BLOCK_LABELS)
    labels = [block for _, block, _ in blocks][::every]
    axes.set_xticks(places[::every], labels, rotation=90, fontsize=7.5 if len(labels) <= 20 else 6)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(places[0] - 0.7, max(places[-1] + 0.7, places[0] + 4))
    axes.set_ylabel(label)
    _stage_legend(figure, owners, num_stages, line=False)
    return figure


@styled
def svg(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an `<svg>` element whose ids start with `prefix`, for several share one page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file at 160 dots an inch."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return data.getvalue()


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _log_axis(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 of every decade; matplotlib's own labels are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    decades = math.log10(axes.dataLim.y1 / axes.dataLim.y0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3.5 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means over equally many neighbours, so that a long run stays a small page."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _stage_lines(
    figure: Figure,
    axes: Axes,
    series: Mapping[int, Sequence[tuple[float, float]]],
    num_stages: int,
    marker: str = "",
) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = stage_colours(num_stages)
    for stage in sorted(series):
        alone = marker or ("o" if len(series[stage]) == 1 else "")
        axes.plot(
            [x for x, _ in series[stage]],
            [y for _, y in series[stage]],
            color=colours[stage],
            linewidth=1.5 if num_stages <= 8 else 1.1,
            marker=alone,
            markersize=3.5,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer step")
    _stage_legend(figure, sorted(series), num_stages, line=True)


def _stage_legend(figure: Figure, stages: Sequence[int], num_stages: int, line: bool) -> None:
    """One row above the axes: a colour and a number for each stage, for 16 of them at most."""
    from matplotlib.lines import Line2D

    colours = stage_colours(num_stages)
    look: dict[str, Any] = {"linewidth": 2.5} if line else {"linestyle": "none", "marker": "s", "markersize": 7}
    shown = _spread(stages, MAX_STAGE_LABELS)
    handles = [Line2D([], [], color=colours[stage], **look) for stage in shown]
    crowded = len(shown) > 8
    figure.legend(
        handles,
        [f"stage {stage}" if stage == shown[0] else str(stage) for stage in shown],
        loc="outside upper left",
        ncols=len(handles),
        fontsize=7.5 if crowded else 8.5,
        handlelength=0.7 if crowded else 1.1,
        handletextpad=0.3,
        columnspacing=0.6 if crowded else 0.9,
        borderaxespad=0.2,
    )
