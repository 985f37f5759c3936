"""The answer of a study in numbers: a row for each stage of each run, means with intervals, paired differences."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipetrgl.config.study import Study
from pipetrgl.studies import diagnostics
from pipetrgl.studies.intervals import Interval, interval
from pipetrgl.studies.study import pair_of
from pipetrgl.studies.trials import Outcome

COLUMNS = (
    "study", "case", "variant", "candidate", "chosen", "seed", "status", "stage", "num_stages", "best_head", "step",
    "epoch", "tau", "valid_accuracy", "valid_loss", "test_accuracy", "test_loss", "train_accuracy", "task_loss",
    "transport_cost", "num_parameters", "head_parameters", "train_s", "images_per_s", "config_hash", "run",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """A variant in one case, by its chosen candidate.

    Attributes:
        candidates: mean validation accuracy of each candidate's best head; None for one that diverged with some seed.
        outcomes: by seed, of the chosen candidate; none where every candidate diverged with some seed.
        diverged: these seeds.
        best, last: test accuracy of the head chosen on validation, and of the last head; None without outcomes.
        stagnation: mean over seeds, on the validation split; 0 where the last head is the best.
        valid_by_stage, test_by_stage: accuracy of each head.
        cost_by_block: mean over seeds.
        taus: of each stage; None where the objective has none.
    """

    case: str
    variant: str
    candidate: str
    candidates: Mapping[str, float | None]
    outcomes: Mapping[int, Outcome]
    diverged: tuple[int, ...]
    best: Interval | None
    last: Interval | None
    stagnation: Interval | None
    valid_by_stage: tuple[Interval, ...]
    test_by_stage: tuple[Interval, ...]
    cost_by_block: Mapping[str, float]
    taus: tuple[float | str | None, ...]

    @property
    def place(self) -> str:
        return pair_of(self.case, self.variant)


@dataclass(frozen=True)
class Comparison:
    """variant - baseline, seed by seed, in test accuracy.

    Attributes:
        case, variant: what is compared.
        baseline: with what, as `Summary.place`.
        head: "best" (of each run, chosen on validation) or "last".
        differences: by seed.
    """

    case: str
    variant: str
    baseline: str
    head: str
    differences: Mapping[int, float]
    interval: Interval

    @property
    def place(self) -> str:
        return pair_of(self.case, self.variant)

    @property
    def sentence(self) -> str:
        """In words, with what the interval allows to say."""
        what = f"{self.place} against {self.baseline}, {self.head} head: {100 * self.interval.mean:+.2f} points"
        return f"{what} ({self.span}, {self.interval.count} paired seeds): {self.verdict}."

    @property
    def span(self) -> str:
        """The interval in points, such as "-0.32 to +0.62"."""
        low, high = self.interval.low, self.interval.high
        return "no interval" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.interval.half is None:
            return "a single seed says nothing about chance"
        if not any(self.differences.values()):
            return "equal with every seed"
        if self.interval.holds_zero:
            return "the interval holds 0, no difference is shown"
        return "better" if self.interval.mean > 0 else "worse"


def summarise(study: Study, outcomes: Sequence[Outcome], chosen: Mapping[str, str]) -> list[Summary]:
    """One summary for each variant in each case, in the order of the file."""
    return [
        _summary(case, variant, outcomes, chosen.get(pair_of(case, variant)))
        for case in study.cases
        for variant in study.variants
    ]


def _summary(case: str, variant: str, outcomes: Sequence[Outcome], candidate: str | None) -> Summary:
    mine = [one for one in outcomes if (one.trial.arm.case, one.trial.arm.variant) == (case, variant)]
    candidates: dict[str, float | None] = {}
    for name in dict.fromkeys(one.trial.arm.candidate for one in mine):
        some = [one for one in mine if one.trial.arm.candidate == name]
        fine = not any(one.error for one in some)
        candidates[name] = statistics.fmean(one.best_valid for one in some) if fine else None
    runs = [one for one in mine if candidate is not None and one.trial.arm.candidate == candidate]
    heads = range(len(runs[0].heads) if runs else 0)
    return Summary(
        case,
        variant,
        candidate or "",
        candidates,
        {one.trial.seed: one for one in runs},
        tuple(sorted({one.trial.seed for one in mine if one.error})) if candidate is None else (),
        interval([_accuracy(one, "best") for one in runs]) if runs else None,
        interval([_accuracy(one, "last") for one in runs]) if runs else None,
        interval([diagnostics.stagnation([s["valid_accuracy"] for s in one.heads]) for one in runs]) if runs else None,
        tuple(interval([one.heads[k]["valid_accuracy"] for one in runs]) for k in heads),
        tuple(interval([one.heads[k]["test_accuracy"] for one in runs]) for k in heads),
        _costs(runs),
        tuple(stage["tau"] for stage in runs[0].stages) if runs else (),
    )


def _costs(runs: Sequence[Outcome]) -> dict[str, float]:
    """Mean transport cost of each block over runs, in the order of the network."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for stage in run.stages:
            for name, cost in stage["transport_cost_by_block"].items():
                found.setdefault(name, []).append(cost)
    return {name: statistics.fmean(costs) for name, costs in found.items()}


def _accuracy(outcome: Outcome, head: str) -> float:
    return float(outcome.stages[outcome.head if head == "best" else -1]["test_accuracy"])


def compare(study: Study, summaries: Sequence[Summary]) -> list[Comparison]:
    """Each variant against each baseline, no pair twice; a baseline without a case is the one in the variant's own."""
    by_place = {summary.place: summary for summary in summaries}
    found: list[Comparison] = []
    for baseline in study.baselines:
        for summary in summaries:
            other = by_place.get(pair_of(summary.case, baseline)) or by_place.get(baseline)
            if other is None or other is summary or not summary.outcomes or not other.outcomes:
                continue
            if any((one.place, one.baseline) == (summary.place, other.place) for one in found):
                continue
            for head in ("best", "last"):
                differences = {
                    seed: _accuracy(one, head) - _accuracy(other.outcomes[seed], head)
                    for seed, one in summary.outcomes.items()
                }
                found.append(
                    Comparison(
                        summary.case, summary.variant, other.place, head, differences,
                        interval(list(differences.values())),
                    )
                )  # fmt: skip
    return found


def to_csv(study: Study, outcomes: Sequence[Outcome], chosen: Mapping[str, str]) -> str:
    """One row for each stage of each run under COLUMNS; one without a stage for a run that diverged."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in outcomes:
        arm = one.trial.arm
        mine: dict[str, Any] = {
            "study": study.name, "case": arm.case, "variant": arm.variant, "candidate": arm.candidate,
            "chosen": chosen.get(pair_of(arm.case, arm.variant)) == arm.candidate, "seed": one.trial.seed,
            "num_stages": one.trial.num_stages, "status": "diverged" if one.error else "done",
        }  # fmt: skip
        if one.error or one.result is None:
            writer.writerow(mine)
            continue
        about = {"step": one.step, "epoch": one.epoch, "config_hash": one.result["config_hash"], "run": one.run.name}
        for stage in one.stages:
            own = {key: stage[key] for key in COLUMNS if key in stage}
            writer.writerow({**mine, **about, **own, "best_head": stage["stage"] == one.head})
    return text.getvalue()


def to_dict(
    study: Study, summaries: Sequence[Summary], comparisons: Sequence[Comparison], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """result.json of a study: shares of 1, not percent."""
    return {
        "schema": 1,
        "command": "study",
        "status": "done",
        "name": study.name,
        "seeds": list(study.seeds),
        "baselines": list(study.baselines),
        "num_runs": len(study.arms) * len(study.seeds),
        "variants": [
            {
                "case": one.case, "variant": one.variant, "candidate": one.candidate,
                "candidates": dict(one.candidates), "diverged": list(one.diverged), "tau": list(one.taus),
                "steps": {seed: run.step for seed, run in one.outcomes.items()},
                "epochs": {seed: run.epoch for seed, run in one.outcomes.items()},
                "heads": {seed: run.head for seed, run in one.outcomes.items()},
                "test_best_head": _as_dict(one.best), "test_last_head": _as_dict(one.last),
                "stagnation_valid": _as_dict(one.stagnation),
                "valid_by_stage": [_as_dict(value) for value in one.valid_by_stage],
                "test_by_stage": [_as_dict(value) for value in one.test_by_stage],
                "transport_cost_by_block": dict(one.cost_by_block),
            }
            for one in summaries
        ],
        "comparisons": [
            {
                "case": one.case, "variant": one.variant, "baseline": one.baseline, "head": one.head,
                "differences": dict(one.differences), **(_as_dict(one.interval) or {}),
                "holds_zero": one.interval.holds_zero, "sentence": one.sentence,
            }
            for one in comparisons
        ],
        "environment": dict(environment),
    }  # fmt: skip


def _as_dict(value: Interval | None) -> dict[str, Any] | None:
    if value is None:
        return None
    assert math.isfinite(value.mean)
    return {"mean": value.mean, "low": value.low, "high": value.high, "count": value.count}
