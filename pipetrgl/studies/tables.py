"""The tables of a run's report, as rows of texts under their headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipetrgl.studies import diagnostics
from pipetrgl.studies.wording import ABSENT, block_range, count, number, percent, rate, size

TABLE_HEADER = [
    "stage",
    "blocks",
    "valid accuracy",
    "test accuracy",
    "local loss",
    "transport cost",
    "images/s",
    "waited",
    "head",
]
WORK_HEADER = [
    "stage",
    "steps",
    "computed",
    "waited for input",
    "waited to send",
    "sent",
    "peak memory",
    "parameters",
    "of the head",
]
ENERGY_HEADER = [
    "stage",
    "cross-entropy",
    "weighted transport cost",
    "sum",
    "cross-entropy before",
    "energy",
]
GEOMETRY_HEADER = [
    "stage",
    "straightness",
    "pairs in order",
    "lowest of a block",
    "largest relative cost",
    "in block",
]


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table by stage, one row a stage under TABLE_HEADER; an absent value is an en dash."""
    rows = []
    for stage in result.get("stages") or []:
        roles = [role for role in ("best", "last") if result.get(f"{role}_head") == stage["stage"]]
        rows.append(
            [
                str(stage["stage"]),
                block_range(stage.get("blocks") or []),
                percent(stage.get("valid_accuracy")),
                percent(stage.get("test_accuracy")),
                number(stage.get("local_loss")),
                number(stage.get("transport_cost")),
                rate(stage.get("images_per_s")),
                percent(stage.get("wait_share")),
                ", ".join(roles),
            ]
        )
    return rows


def energy_rows(rows: Sequence[Mapping[str, Any]], num_stages: int) -> list[list[str]]:
    """The table of the energy under ENERGY_HEADER, from means over each stage's last epoch; empty if one has none."""
    tasks, costs = [], []
    for stage in range(num_stages):
        own = [row for row in rows if row["kind"] == "train" and row["stage"] == stage and row["task_loss"] is not None]
        last = [row for row in own if row["epoch"] == own[-1]["epoch"]]
        if not last:
            return []
        tasks.append(sum(row["task_loss"] for row in last) / len(last))
        costs.append(sum(row["weight"] * row["transport_cost"] for row in last) / len(last))
    flags = ["rises" if rises else "falls" for rises in diagnostics.energy_rises(tasks, costs)]
    before = [None, *tasks[:-1]]
    columns = (range(num_stages), tasks, costs, before, [ABSENT, *flags])
    return [
        [str(stage), number(task), number(cost), number(task + cost), number(earlier), flag]
        for stage, task, cost, earlier, flag in zip(*columns, strict=True)
    ]


def geometry_rows(stages: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The table of the stages' geometry under GEOMETRY_HEADER, at the last validation; empty if there was none."""
    rows = []
    for stage in stages:
        geometry = stage.get("geometry") or {}
        if not geometry:
            continue
        shares = [share for share in geometry["monotone_share_by_block"].values() if share is not None]
        costs = {block: cost for block, cost in geometry["relative_cost_by_block"].items() if cost is not None}
        farthest = max(costs, key=lambda block: costs[block], default=None)
        rows.append(
            [
                str(stage["stage"]),
                number(geometry["straightness"]),
                percent(geometry["monotone_share"]),
                percent(min(shares, default=None)),
                number(None if farthest is None else costs[farthest]),
                farthest or ABSENT,
            ]
        )
    return rows


def stagnation_line(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stagnation index on the validation split, explained; or why there is none."""
    accuracies = [stage.get("valid_accuracy") for stage in stages]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if not known or len(known) < len(accuracies):
        return "Stagnation index: no validation has passed every head."
    index = 100 * diagnostics.stagnation(known)
    return (
        f"Stagnation index: {index:.1f} points, the validation accuracy of the best head less that of the last; "
        "0 where the last is the best."
    )


def _steps(stage: Mapping[str, Any]) -> str:
    """Updates of a stage, and beside them those on reused micro-batches."""
    reused = stage.get("num_reused") or 0
    return count(stage.get("num_steps")) + (f" and {count(reused)} reused" if reused else "")


def work_rows(stages: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            str(stage["stage"]),
            _steps(stage),
            percent(stage.get("compute_share")),
            percent(stage.get("wait_share")),
            percent(stage.get("send_wait_share")),
            size(stage.get("bytes_sent")),
            size(stage.get("peak_rss_bytes")),
            count(stage.get("num_parameters")),
            count(stage.get("head_parameters")),
        ]
        for stage in stages
    ]
