"""The figures of a study: accuracy by stage, paired differences, transport cost by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipetrgl.studies.plots import HEIGHT, INK, NARROW, WIDE, canvas, styled
from pipetrgl.studies.study_results import Comparison, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")  # Okabe and Ito's, and a grey
_MARKERS = "osD^vPX"
_SHOWN_LABELS = 24


def looks(variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each variant, the same in every figure of a study."""
    return {
        name: {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        for place, name in enumerate(variants)
    }


@styled
def accuracy_by_stage(summaries: Sequence[Summary], look: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Test accuracy over the stages, a line a variant: mean over seeds, and its interval as a band.

    Returns:
        None where no variant has more than one stage, which makes no curve.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [one for one in summaries if len(one.test_by_stage) > 1]
    if not drawn:
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    for one in drawn:
        stages = range(len(one.test_by_stage))
        style = look[one.variant]
        means = [100 * value.mean for value in one.test_by_stage]
        axes.plot(stages, means, markersize=4, label=one.variant, **style)
        halves = [value.half for value in one.test_by_stage]
        if None not in halves:
            low = [mean - 100 * (half or 0) for mean, half in zip(means, halves, strict=True)]
            high = [mean + 100 * (half or 0) for mean, half in zip(means, halves, strict=True)]
            axes.fill_between(stages, low, high, color=style["color"], alpha=0.13, linewidth=0)
    # one variant's wide band must not press all lines flat
    shown = [100 * value.mean for one in drawn for value in one.test_by_stage]
    room = max(1.0, 0.6 * (max(shown) - min(shown)))
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, min(shown) - room), min(top, max(shown) + room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.set_xlabel("stage of the head")
    axes.set_ylabel("test accuracy (%)")
    figure.legend(loc="outside upper left", ncols=min(len(drawn), 4))
    return figure


@styled
def differences(comparisons: Sequence[Comparison], look: Mapping[str, dict[str, Any]]) -> Figure | None:
    """A row for each variant: the mean paired difference with its interval; filled the best head, hollow the last."""
    if not comparisons:
        return None
    places = list(dict.fromkeys(one.place for one in comparisons))
    figure, axes = canvas(WIDE, 1.0 + 0.34 * len(places))
    for one in comparisons:
        row = places.index(one.place) + (-0.14 if one.head == "best" else 0.14)
        style = look[one.variant]
        mean, half = 100 * one.interval.mean, 100 * (one.interval.half or 0)
        axes.plot([mean - half, mean + half], [row, row], color=style["color"], linewidth=1.6)
        fill = style["color"] if one.head == "best" else "white"
        axes.plot([mean], [row], markersize=5.5, markerfacecolor=fill, linestyle="none", **style)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(places)), places)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlabel(f"test accuracy less that of {_baseline(comparisons)} (points)")
    return figure


@styled
def transport_by_block(summaries: Sequence[Summary], look: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Transport cost of each residual block in the order of the network, a line a variant, mean over seeds."""
    from matplotlib.ticker import FuncFormatter

    drawn = [one for one in summaries if one.cost_by_block]
    if not drawn:
        return None
    figure, axes = canvas(NARROW, HEIGHT)
    names = max((list(one.cost_by_block) for one in drawn), key=len)
    for one in drawn:
        here = [place for place, name in enumerate(names) if name in one.cost_by_block]
        costs = [one.cost_by_block[names[place]] for place in here]
        axes.plot(here, costs, markersize=3.5, label=one.variant, **look[one.variant])
    costs = [cost for one in drawn for cost in one.cost_by_block.values()]
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    every = -(-len(names) // _SHOWN_LABELS)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("transport cost of the block")
    figure.legend(loc="outside upper left", ncols=min(len(drawn), 4))
    return figure


def _baseline(comparisons: Sequence[Comparison]) -> str:
    """The common baseline; its variant alone where each case has its own."""
    names = {one.baseline for one in comparisons}
    return names.pop() if len(names) == 1 else names.pop().rpartition("/")[2]
