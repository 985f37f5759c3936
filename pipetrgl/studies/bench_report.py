"""Writes the report of a bench from its folder: one page without scripts or network, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipetrgl.errors import ConfigError
from pipetrgl.studies import bench_plots, plots
from pipetrgl.studies.bench_results import kind_of
from pipetrgl.studies.page import drawing, render, require_extra
from pipetrgl.studies.report import Panel
from pipetrgl.studies.timeline import comparison
from pipetrgl.studies.wording import ABSENT, percent, rate, size

Part = Mapping[str, Any]

HEADER = [
    "contender", "images/s", "over serial", "efficiency", "pipetrgl over it", "over predicted",
    "waited, by worker", "CPU a batch", "sent a batch",
]  # fmt: skip


def write_bench_report(folder: Path) -> Path:
    """Write plots/*.png and report.html of a bench, finished or not.

    Returns:
        The path of report.html.
    Raises:
        ConfigError: matplotlib or jinja2 is missing, or result.json is missing or damaged.
    """
    require_extra()
    result = _read(folder / "result.json")
    sections = [("Scaling", _scaling(result["points"]))]
    sections += [(title_of(point), _at_point(point, folder)) for point in main_points(result["points"])]
    panels = [panel for _, some in sections for panel in some if panel.figure is not None]
    (folder / "plots").mkdir(exist_ok=True)
    for stale in (folder / "plots").glob("*.png"):
        stale.unlink()
    for panel in panels:
        assert panel.figure is not None
        (folder / "plots" / f"{panel.file}.png").write_bytes(plots.png(panel.figure))
    drawn = [
        (title, [(one, drawing(one.figure, one.file, one.title) if one.figure else None) for one in some])
        for title, some in sections
    ]
    page = folder / "report.html"
    bench = (folder / "bench.yaml").read_text(encoding="utf-8")
    page.write_text(render("bench.html.j2", {**_page(result), "sections": drawn, "bench": bench}), "utf-8")
    return page


def main_points(points: Sequence[Part]) -> list[Part]:
    """Of each number of workers and rows the first point, at which peers run as well."""
    first: dict[tuple[int, int], Part] = {}
    for point in points:
        first.setdefault((point["workers"], point["batch"]), point)
    return list(first.values())


def title_of(point: Part) -> str:
    workers = "1 worker" if point["workers"] == 1 else f"{point['workers']} workers"
    return f"{workers}, batch {point['batch']}, capacity {point['capacity']}, {point['codec']}, cuts {point['cuts']}"


def table_rows(point: Part) -> list[list[str]]:
    """Under HEADER, one a contender, quartiles on a line of their own; of one that failed the name and the reason."""

    def two_lines(spread: Mapping[str, float] | None, form: str) -> str:
        return spread_text(spread, form).replace(" (", "\n(")

    rows = []
    for one in point["contenders"]:
        if one["images_per_s"] is None:
            rows.append([one["contender"], one["error"]])
            continue
        ratio = one["measured_over_predicted"]
        rows.append(
            [
                one["contender"],
                two_lines(one["images_per_s"], ",.1f"),
                two_lines(one["speed_up"], ".3f"),
                percent(one["efficiency"]),
                ABSENT if one["contender"] == "pipetrgl" else two_lines(one["pipetrgl_over"], ".3f"),
                ABSENT if ratio is None else f"{ratio:.3f}\n(of {rate(one['predicted_images_per_s'])})",
                "\n".join(percent(share) for share in one["wait_share"]) or ABSENT,
                f"{1e3 * sum(one['cpu_s_per_batch']):,.1f} ms" if one["cpu_s_per_batch"] else ABSENT,
                size(sum(one["sent_bytes_per_batch"])) if one["sent_bytes_per_batch"] else ABSENT,
            ]
        )
    return rows


def spread_text(spread: Mapping[str, float] | None, form: str) -> str:
    """Median and quartiles: "1.81 (1.78 to 1.84)"."""
    if spread is None:
        return ABSENT
    median, low, high = (format(spread[key], form) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def findings(result: Part) -> list[str]:
    """What the largest points of the grid say, a sentence each."""
    sentences = []
    for point in main_points(result["points"]):
        mine = bench_plots.found(point, "pipetrgl")
        if mine is None or point["workers"] == 1:
            continue
        names = [one["contender"] for one in point["contenders"] if one["images_per_s"]]
        rivals = [name for name in names if name == "ddp" or name.startswith("end_to_end")]
        rivals = ["serial", *bench_plots.best_schedules(point)[:1], *rivals]
        pairs = [("its slowest stage alone", point["over_slowest_stage"])]
        pairs += [(name, (bench_plots.found(point, name) or {}).get("pipetrgl_over")) for name in rivals]
        said = [f"{spread_text(ratio, '.3f')} times {name}" for name, ratio in pairs if ratio is not None]
        where = f"{point['workers']} workers, batch {point['batch']}"
        sentences.append(f"{where}: pipetrgl is {', '.join(said)}." if said else f"{where}: nothing to compare with.")
    return sentences


def _scaling(points: Sequence[Part]) -> list[Panel]:
    """Figures over several points."""
    main, panels = main_points(points), []
    groups = {
        f"strong scaling, batch {batch}": [one for one in main if one["strong"] and one["batch"] == batch]
        for batch in dict.fromkeys(one["batch"] for one in main if one["strong"])
    } | {
        f"weak scaling, {rows} rows a worker": [
            one for one in main if one["weak"] and one["batch"] == rows * one["workers"]
        ]
        for rows in dict.fromkeys(one["batch"] // one["workers"] for one in main if one["weak"])
    }
    for number, (title, group) in enumerate(groups.items()):
        ordered = sorted(group, key=lambda one: int(one["workers"]))
        if len(ordered) < 2:
            continue  # a single point makes no line; its own section has its figures
        absent = "The serial loop was no contender: there is nothing to count a speed-up over."
        panels += [
            Panel(
                f"Speed-up, {title}",
                "Images/s over those of the serial loop of the same stages in the same round; medians, bars are "
                "quartiles. Of torch's schedules those that were fastest at some point.",
                bench_plots.speed_up(ordered),
                absent,
                f"speed_up_{number}",
            ),
            Panel(
                f"Efficiency, {title}",
                "The speed-up divided by the number of workers.",
                bench_plots.efficiency(ordered),
                absent,
                f"efficiency_{number}",
            ),
        ]
    panels.append(
        Panel(
            "Predicted and measured",
            "Predictions come from a profile, taken before the first point of each batch and codec while no contender "
            f"runs, and the measured link, through the simulator; above the line it went faster. {_busy(points)}",
            bench_plots.predictions(points),
            "Nothing that is predicted was measured.",
            "predictions",
        )
    )
    for place in main:
        same = [one for one in points if (one["workers"], one["batch"]) == (place["workers"], place["batch"])]
        where = f"{place['workers']} workers, batch {place['batch']}"
        name = f"{place['workers']}x{place['batch']}"
        codecs = [one for one in same if one["capacity"] == place["capacity"]]
        capacities = [one for one in same if one["codec"] == place["codec"]]
        panels += [
            Panel(f"Codecs, {where}", f"Capacity {place['capacity']}; pipetrgl, whiskers are quartiles.",
                  bench_plots.by_codec(codecs), "", f"codecs_{name}"),
            Panel(f"Capacities, {where}", f"Codec {place['codec']}; pipetrgl, whiskers are quartiles.",
                  bench_plots.by_capacity(capacities), "", f"capacities_{name}"),
        ]  # fmt: skip
    return [panel for panel in panels if panel.figure is not None or panel.absent]


def _busy(points: Sequence[Part]) -> str:
    """What the profiles say of the machine."""
    shares = [point["profile_cpu_share"] for point in points if point["profile_cpu_share"] is not None]
    if not shares:
        return ""
    warning = "; others kept this machine busy, and the predictions are too low" if min(shares) < 0.9 else ""
    return f"The profiles got at least {percent(min(shares))} of a processor{warning}."


def _at_point(point: Part, folder: Path) -> list[Panel]:
    """Figures of one point."""
    number = point["point"]
    shown = _worth_a_picture(point)
    traces = {
        f"{one['contender']}, median {rate(one['images_per_s']['median'])} images/s": _read(folder / one["trace"])[
            "traceEvents"
        ]
        for one in shown
        if one["trace"]
    }
    panels = [
        Panel(
            "Images a second",
            "Medians; whiskers are quartiles, diamonds what was predicted.",
            bench_plots.rates(point),
            "No contender got through a round.",
            f"rates_{number}",
        ),
        Panel(
            "Waiting",
            "Share of the measured time in which a worker waits to receive or to send. ddp has no bars: its waits hide "
            "in the backward pass. The fastest number of micro-batches of each schedule.",
            bench_plots.waits(shown, point["workers"]),
            "No contender knows how long its workers waited.",
            f"waits_{number}",
        ),
        Panel(
            "Timelines of the last round",
            "All on one scale; numbers, where they fit, are batches. Idle is the share of the window in which a worker "
            "computes nothing, the bubble; waits are the part of it in which it waits to receive or to send. Of each "
            "of torch's schedules the fastest number of micro-batches; ddp's all-reduce lies within its backward pass.",
            comparison(traces),
            "No trace was recorded.",
            f"timelines_{number}",
        ),
    ]
    return panels if point["workers"] > 1 else panels[:1]


def _worth_a_picture(point: Part) -> list[Part]:
    """What ran, without the single stages, and of each of torch's schedules the fastest number of micro-batches."""
    best = bench_plots.best_schedules(point)
    ran = [one for one in point["contenders"] if one["images_per_s"] and not one["contender"].startswith("stage ")]
    return [one for one in ran if kind_of(one["contender"]) == one["contender"] or one["contender"] in best]


def _page(result: Part) -> dict[str, Any]:
    """The values of the template besides the figures."""
    points, link, topology = result["points"], result["link"], result["topology"]
    threads = sorted({point["threads"] for point in points})
    hosts = topology["hosts"]
    about = {
        "hosts": hosts,
        "processor": topology["processor"],
        "cores that this process may use": topology["cores"],
        "threads a worker": ", ".join(map(str, threads)) or ABSENT,
        "load average before": f"{topology['load_average']:.2f}",
        "link": f"{1e6 * link['latency_s']:.0f} µs and {link['bytes_per_s'] / 1e9:.2f} GB/s, measured before",
        "bench's hash": result["bench_hash"][:12],
        **result["environment"],
    }
    return {
        "name": result["name"],
        "status": result["status"],
        "error": result["error"],
        "summary": f"{result['model']} on {result['data']}, cuts {'planned' if result['planned'] else 'as given'}",
        "rounds": result["rounds"],
        "batches": result["batches"],
        "warm_up": result["warm_up"],
        "findings": findings(result),
        "header": HEADER,
        "tables": [(title_of(point), point, table_rows(point)) for point in points],
        "chip": {one["contender"]: bench_plots.colour_of(one["contender"]) for p in points for one in p["contenders"]},
        "schedules": any(kind_of(one["contender"]) != one["contender"] for p in points for one in p["contenders"]),
        "peaks": [
            (title_of(point), " / ".join(size(peak) for peak in point["peak_rss_bytes"]) or ABSENT) for point in points
        ],
        "environment": [(key, ABSENT if value is None else str(value)) for key, value in about.items()],
        "folder": Path(result["run"]).name,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return content
