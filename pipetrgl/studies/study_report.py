"""Writes the answer of a study: results.csv, result.json, and one page with its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipetrgl.config.study import Study
from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.environment import environment
from pipetrgl.studies import plots, study_plots
from pipetrgl.studies.intervals import Interval
from pipetrgl.studies.page import drawing, render, require_extra
from pipetrgl.studies.study import pair_of
from pipetrgl.studies.study_results import Comparison, Summary, compare, summarise, to_csv, to_dict
from pipetrgl.studies.trials import Outcome
from pipetrgl.studies.wording import ABSENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = [
    "variant", "chosen", "tau", "test, best head", "test, last head", "stagnation index", "epoch",
    "best head of K", "seeds",
]  # fmt: skip


def write_answer(study: Study, outcomes: Sequence[Outcome], chosen: Mapping[str, str], folder: Path) -> list[str]:
    """Write all files of the answer.

    Returns:
        The answer in lines of text.
    """
    summaries = summarise(study, outcomes, chosen)
    comparisons = compare(study, summaries)
    result = to_dict(study, summaries, comparisons, environment())
    write_atomically(folder / "results.csv", to_csv(study, outcomes, chosen).encode())
    write_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    try:
        page = str(write_page(study, summaries, comparisons, result["environment"], folder))
    except ConfigError as error:  # a missing plotting library is no reason for a finished study to fail
        page = f"not written, {error}"
    return [*findings(summaries, comparisons), f"results: {folder / 'results.csv'}", f"report: {page}"]


def findings(summaries: Sequence[Summary], comparisons: Sequence[Comparison]) -> list[str]:
    """What a study found, a sentence each: differences as they are, and what could not be compared."""
    seeds = [f"{one.place} diverged with seed {', '.join(map(str, one.diverged))}" for one in summaries if one.diverged]
    return [*(one.sentence for one in comparisons), *(f"{text}: it is compared with nothing." for text in seeds)]


def write_page(
    study: Study,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    about: Mapping[str, Any],
    folder: Path,
) -> Path:
    """Write plots/*.png and report.html.

    Raises:
        ConfigError: matplotlib or jinja2 is missing.
    """
    require_extra()
    figures = _figures(study, summaries, comparisons)
    (folder / "plots").mkdir(exist_ok=True)
    for name, (_, figure) in figures.items():
        (folder / "plots" / f"{name}.png").write_bytes(plots.png(figure))
    drawn = [
        {
            "title": title,
            "drawing": drawing(figure, name, title),
            "wide": figure.get_figwidth() > plots.NARROW,
        }
        for name, (title, figure) in figures.items()
    ]
    page = folder / "report.html"
    values = _page(study, summaries, comparisons, about)
    page.write_text(render("study.html.j2", {**values, "figures": drawn}), encoding="utf-8")
    return page


def _figures(
    study: Study, summaries: Sequence[Summary], comparisons: Sequence[Comparison]
) -> dict[str, tuple[str, Figure]]:
    """File name -> title and figure."""
    look = study_plots.looks(study.variants)
    found: dict[str, tuple[str, Figure | None]] = {}
    for baseline in study.baselines:
        mine = [one for one in comparisons if one.baseline in (baseline, pair_of(one.case, baseline))]
        title = f"Paired differences in test accuracy, against {baseline}"
        found[f"differences_{baseline.replace('/', '_')}"] = title, study_plots.differences(mine, look)
    for case in study.cases:
        some = [one for one in summaries if one.case == case]
        tail, suffix = (f", {case}", f"_{case}") if case else ("", "")
        found[f"accuracy{suffix}"] = f"Accuracy by stage{tail}", study_plots.accuracy_by_stage(some, look)
        cost = study_plots.transport_by_block(some, look)
        found[f"transport{suffix}"] = f"Transport cost by block{tail}", cost
    return {name: (title, figure) for name, (title, figure) in found.items() if figure is not None}


def _page(
    study: Study, summaries: Sequence[Summary], comparisons: Sequence[Comparison], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of the template besides the figures."""
    intervals = [one for one in comparisons if one.interval.half is not None]
    return {
        "name": study.name,
        "seeds": ", ".join(map(str, study.seeds)),
        "num_seeds": len(study.seeds),
        "baselines": study.baselines,
        "clear": [one.sentence for one in comparisons if one.interval.holds_zero is False],
        "differences": [
            (one.place, one.baseline, one.head, f"{100 * one.interval.mean:+.2f}", one.span, one.verdict)
            for one in comparisons
        ],
        "diverged": findings(summaries, []),
        "num_intervals": len(intervals),
        "expected_misses": f"{0.05 * len(intervals):.1f}",
        "header": HEADER,
        "tables": [(case, [_row(one) for one in summaries if one.case == case]) for case in study.cases],
        "choices": [
            (one.place, name, f"{100 * mean:.2f} %" if mean is not None else "diverged", name == one.candidate)
            for one in summaries
            if len(one.candidates) > 1
            for name, mean in one.candidates.items()
        ],
        "environment": [(key, ABSENT if value is None else str(value)) for key, value in about.items()],
    }


def _row(one: Summary) -> list[str]:
    """Under HEADER."""
    runs = list(one.outcomes.values())
    epochs = sorted({run.epoch for run in runs})
    heads = sorted(run.head for run in runs)
    return [
        one.variant,
        one.candidate or ABSENT,
        ", ".join(dict.fromkeys(_tau(tau) for tau in one.taus if tau is not None)) or ABSENT,
        _percent(one.best),
        _percent(one.last),
        _points(one.stagnation),
        "" if not epochs else str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}",
        f"{', '.join(map(str, heads))} of {len(one.test_by_stage)}" if heads else ABSENT,
        f"diverged: {', '.join(map(str, one.diverged))}" if one.diverged else str(len(runs)),
    ]


def _percent(value: Interval | None) -> str:
    if value is None:
        return ABSENT
    return f"{100 * value.mean:.2f}" + (f" ± {100 * value.half:.2f} %" if value.half is not None else " %")


def _points(value: Interval | None) -> str:
    return ABSENT if value is None else f"{100 * value.mean:.2f}"


def _tau(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else value
