"""Writes the report of a run: one page without scripts or network, and its figures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipetrgl.errors import ConfigError
from pipetrgl.studies import diagnostics, plots
from pipetrgl.studies.page import drawing, render, require_extra
from pipetrgl.studies.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABSENT = "\N{EN DASH}"
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


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        config, config_text: the resolved config, parsed and as written.
        rows: the metrics, oldest first.
        result: result.json; where that is missing, the same shape with what the config and the metrics know.
        events: the trace's events; none if no trace was recorded.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def num_stages(self) -> int:
        return int(self.result["num_stages"])


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


def read_run(run: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        ConfigError: no config.yaml, or a damaged file; a half-written last line of metrics.jsonl is no damage.
    """
    config_path = run / "config.yaml"
    if not config_path.is_file():
        raise ConfigError(f"{run} is not a run folder: it holds no config.yaml")
    config_text = config_path.read_text(encoding="utf-8")
    config = yaml.safe_load(config_text) or {}
    rows = _read_rows(run / "metrics.jsonl")
    # A run that failed early leaves a result with gaps: what the metrics know fills them.
    found = _read_json(run / "result.json") or {}
    known = {key: value for key, value in found.items() if value not in (None, [], {})}
    trace = _read_json(run / "trace.json") or {}
    return RunRecord(
        folder=run,
        config=config,
        config_text=config_text,
        rows=rows,
        result={**_unfinished(run.name, config, rows), **known},
        events=trace.get("traceEvents", []),
    )


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


def block_range(blocks: Sequence[str]) -> str:
    """First and last block of a stage: "layer1.0 .. layer1.3"."""
    if not blocks:
        return ABSENT
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} .. {blocks[-1]}"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """Three significant digits; NaN and infinity are values, only None is absent."""
    if value is None:
        return ABSENT
    return f"{value:#.3g}" if math.isfinite(value) and value != 0 else f"{value:g}"


def rate(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Decimal units, as in every size of this project."""
    if value is None:
        return ABSENT
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # A run killed while it writes leaves half a line, perhaps half a character, and no newline after it.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if place < len(lines):
                raise ConfigError(f"{path} line {place}: not JSON: {error.msg}") from error
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} line {error.lineno}: not JSON: {error.msg}") from error
    return content


def _unfinished(name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shape of result.json for a run that left none: what the config and the metrics know, nothing else."""
    seen = 1 + max((row["stage"] for row in rows), default=-1)
    num_stages = max((config.get("pipeline") or {}).get("stages", 1), seen)
    # A validation counts once every head has it: only then can heads be compared.
    valid = [heads for heads in plots.evaluations(rows, "valid").values() if len(heads) == num_stages]
    test = [heads for heads in plots.evaluations(rows, "test").values() if len(heads) == num_stages]
    last_train = {row["stage"]: row for row in rows if row["kind"] == "train"}
    stages = []
    for stage in range(num_stages):
        row = last_train.get(stage, {})
        costs = row.get("transport_cost_by_block") or {}
        measured = ("local_loss", "task_loss", "transport_cost", "images_per_s", "wait_share")
        stages.append(
            {
                "stage": stage,
                "blocks": list(costs),
                "valid_accuracy": valid[-1][stage] if valid else None,
                "test_accuracy": test[-1][stage] if test else None,
                "transport_cost_by_block": costs,
                **{key: row.get(key) for key in measured},
            }
        )
    return {
        "status": "unfinished",
        "name": (config.get("run") or {}).get("name", name),
        "launcher": (config.get("launcher") or {}).get("name"),
        "num_stages": num_stages,
        "num_steps": max((row["step"] for row in last_train.values()), default=None),
        "stages": stages,
        "best_head": max(valid[-1], key=lambda stage: (valid[-1][stage], -stage)) if valid else None,
        "last_head": num_stages - 1,
    }


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
            no_train,
            "transport_cost",
        ),
        Panel(
            "Transport cost by block",
            "Last recorded cost of each residual block, in the order of the network; "
            "a gap between bars is a cut between stages.",
            plots.transport_by_block(result["stages"], num_stages),
            "No transport cost by block has been recorded.",
            "transport_by_block",
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
        "work_header": WORK_HEADER,
        "work": _work_rows(stages),
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


def _steps(stage: Mapping[str, Any]) -> str:
    """Updates of a stage, and beside them those on reused micro-batches."""
    reused = stage.get("num_reused") or 0
    return count(stage.get("num_steps")) + (f" and {count(reused)} reused" if reused else "")


def _work_rows(stages: Iterable[Mapping[str, Any]]) -> list[list[str]]:
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
