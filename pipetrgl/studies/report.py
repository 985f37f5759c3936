"""Writes the report of a run: one page without scripts or network, and its figures as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipetrgl.studies import plots
from pipetrgl.studies.page import drawing, render, require_extra
from pipetrgl.studies.record import RunRecord, read_run
from pipetrgl.studies.tables import (
    ENERGY_HEADER,
    GEOMETRY_HEADER,
    TABLE_HEADER,
    WORK_HEADER,
    energy_rows,
    geometry_rows,
    stagnation_line,
    table_rows,
    work_rows,
)
from pipetrgl.studies.timeline import timeline
from pipetrgl.studies.wording import ABSENT, count, duration, percent, rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """A figure on the page, or the sentence that says why there is none."""

    title: str
    caption: str
    figure: Figure | None
    absent: str
    file: str

    @property
    def wide(self) -> bool:
        return self.figure is not None and self.figure.get_figwidth() > plots.NARROW


def write_report(run: Path) -> Path:
    """Writes plots/*.png and report.html into a run folder, finished or not.

    Returns:
        The path of report.html.
    Raises:
        ConfigError: matplotlib or jinja2 is missing, this is no run folder, or one of its files is damaged.
    """
    require_extra()
    record = read_run(run)
    panels = _panels(record)
    (run / "plots").mkdir(exist_ok=True)
    for panel in panels:
        path = run / "plots" / f"{panel.file}.png"
        if panel.figure is None:
            path.unlink(missing_ok=True)  # of an earlier report, which knew more
        else:
            path.write_bytes(plots.png(panel.figure))
    drawings = [drawing(panel.figure, panel.file, panel.title) if panel.figure else None for panel in panels]
    page = render("report.html.j2", {**_page(record), "panels": list(zip(panels, drawings, strict=True))})
    report = run / "report.html"
    report.write_text(page, encoding="utf-8")
    return report


def _panels(record: RunRecord) -> list[Panel]:
    rows, result = record.rows, record.result
    num_stages = record.num_stages
    drawn = timeline(record.events, num_stages)
    outlined = drawn[1] if drawn else None
    path = "" if outlined is None else f" Outlined: micro-batch {outlined} on its way through the stages."
    no_valid = "No validation has been recorded yet."
    no_train = "No training step has been recorded yet."
    panels = [
        Panel(
            "Accuracy by stage",
            "Each line is one evaluation of all heads, from faint (early) to strong (last); "
            "it should rise to the right: a flat end means that the later stages add little.",
            plots.accuracy_by_stage(rows, num_stages),
            no_valid,
            "accuracy_by_stage",
        ),
        Panel(
            "Accuracy over training",
            "Validation accuracy of each head; a gap between neighbouring lines is what that stage adds.",
            plots.accuracy_over_steps(rows, num_stages),
            no_valid,
            "accuracy_over_steps",
        ),
        Panel(
            "Local loss",
            "What each stage minimises on the training split: task loss plus weighted transport cost; "
            "means between metrics rows.",
            plots.training_curve(rows, num_stages, "local_loss", "local loss"),
            no_train,
            "local_loss",
        ),
        Panel(
            "Transport cost",
            "How far each stage moves its activations, before weighting: low means close to the identity.",
            plots.training_curve(rows, num_stages, "transport_cost", "transport cost"),
            "No transport cost has been recorded.",
            "transport_cost",
        ),
        Panel(
            "Transport cost by block",
            "Last recorded cost of each residual block, in the order of the network; "
            "a gap between bars is a cut between stages.",
            plots.cost_by_block(_costs(result["stages"]), num_stages, "transport cost of the block"),
            "No transport cost by block has been recorded.",
            "transport_by_block",
        ),
        Panel(
            "Relative transport cost by block",
            "Mean square of what each residual block adds, over that of what it takes, on validation images: "
            "a block far above its neighbours moves most of what came in.",
            plots.cost_by_block(_relative_costs(result["stages"]), num_stages, "relative transport cost"),
            "None has been recorded: it comes with validations, where blocks have residuals, and not end to end.",
            "relative_cost_by_block",
        ),
        Panel(
            "Waiting",
            "Share of its time that each stage waits for input: where it rises from one stage to the next, "
            "the earlier one is the slower.",
            plots.training_curve(rows, num_stages, "wait_share", "time waiting for input (%)", scale=100),
            no_train,
            "waiting",
        ),
        Panel(
            "Workers' timeline",
            "One row a worker; numbers, where they fit, are micro-batches; idle is the share of this window in which "
            f"it computes nothing, whether it sends, waits or stalls.{path}",
            drawn[0] if drawn else None,
            "No trace was recorded (trace.json is missing or empty; trace.num_steps sets its length).",
            "timeline",
        ),
    ]
    comparing = ("accuracy_by_stage", "waiting")  # a single stage has nothing to be compared with
    return [panel for panel in panels if num_stages > 1 or panel.file not in comparing]


def _costs(stages: Iterable[Mapping[str, Any]]) -> plots.Costs:
    return {stage["stage"]: stage.get("transport_cost_by_block") or {} for stage in stages}


def _relative_costs(stages: Iterable[Mapping[str, Any]]) -> plots.Costs:
    return {stage["stage"]: (stage.get("geometry") or {}).get("relative_cost_by_block") or {} for stage in stages}


def _page(record: RunRecord) -> dict[str, Any]:
    """The values of the template besides the figures."""
    result = record.result
    stages = result["stages"]
    best, last = result.get("best_head"), result.get("last_head")
    return {
        "name": result.get("name") or record.folder.name,
        "status": result.get("status") or "unfinished",
        "summary": _summary(record),
        "facts": [
            ("test accuracy, best head", percent(_of_head(stages, best, "test_accuracy")), _head_note(best)),
            ("test accuracy, last head", percent(_of_head(stages, last, "test_accuracy")), _head_note(last)),
            ("throughput", rate(result.get("images_per_s")), "images/s"),
            ("training time", duration(result.get("train_s")), f"{count(result.get('num_steps'))} steps"),
            ("parameters", *_parameters(result)),
        ],
        "best": best,
        "error": result.get("error"),
        "header": TABLE_HEADER,
        "colours": plots.stage_colours(record.num_stages),
        "table": table_rows(result),
        "energy_header": ENERGY_HEADER,
        "energy": energy_rows(record.rows, record.num_stages),
        "stagnation": stagnation_line(stages),
        "geometry_header": GEOMETRY_HEADER,
        "geometry": geometry_rows(stages),
        "work_header": WORK_HEADER,
        "work": work_rows(stages),
        "config_text": record.config_text,
        "environment": [
            (key, ABSENT if value is None else str(value)) for key, value in (result.get("environment") or {}).items()
        ],
        "folder": record.folder.resolve().name,
    }


def _summary(record: RunRecord) -> str:
    """One line: what was trained on what, in how many stages, by which launcher."""
    result, config = record.result, record.config
    data, model, objective = (config.get(key) or {} for key in ("data", "model", "objective"))
    network = "-".join(str(model[key]) for key in ("name", "depth") if model.get(key) is not None) or ABSENT
    num_stages = record.num_stages
    parts = [
        f"{network} on {data.get('name', ABSENT)}",
        f"{num_stages} {'stage' if num_stages == 1 else 'stages'}",
        f"objective {objective.get('name', ABSENT)}",
        f"launcher {result.get('launcher') or ABSENT}",
    ]
    return ", ".join(parts)


def _of_head(stages: Iterable[Mapping[str, Any]], head: int | None, key: str) -> Any:
    return next((stage.get(key) for stage in stages if stage["stage"] == head), None)


def _head_note(head: int | None) -> str:
    return ABSENT if head is None else f"stage {head}"


def _parameters(result: Mapping[str, Any]) -> tuple[str, str]:
    counts = result.get("num_parameters") or {}
    stages, heads = counts.get("stages"), counts.get("heads")
    total, extra = (None if some is None or None in some else sum(some) for some in (stages, heads))
    return count(total), f"and {count(extra)} in heads"
