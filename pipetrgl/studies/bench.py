"""Runs a bench: at every point of its grid contenders take turns, and each measurement is written down at once."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, final

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.bench import Bench, Point
from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.errors import PipetrglError
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.folder import make_bench_folder
from pipetrgl.launchers.start import describe
from pipetrgl.studies.bench_results import COLUMNS, RESULT_SCHEMA, Outcome, csv_row, point_result
from pipetrgl.studies.costs import LinkSpeed
from pipetrgl.studies.link_speed import measure_link
from pipetrgl.studies.measurement import Case, Measurement
from pipetrgl.studies.planner import Terms
from pipetrgl.studies.planning import make_plan
from pipetrgl.studies.prediction import predict
from pipetrgl.studies.profile import Profile, profile
from pipetrgl.studies.timeline import trace_events

Measure = Callable[[Case], Iterator[Measurement]]

_REPEATS = 10


def run_bench(bench: Bench, measure: Measure, say: Callable[[str], None]) -> Path:
    """Measure every point, in a new folder.

    Args:
        bench: checked.
        measure: gives the measurements of one point as they are taken.
        say: gets lines of progress.
    Returns:
        The folder, with all but the page.
    Raises:
        ConfigError: a point that cannot be drawn up; nothing has been measured.
        PipetrglError: the first error of a measurement that is not one contender's own; what came before is kept.
    """
    spec = describe(bench.points[0].config)
    blueprints = [draw_up(point.config, spec) for point in bench.points]
    folder = make_bench_folder(bench)
    say(f"bench: {folder}")
    load_average = os.getloadavg()[0]
    link = measure_link(repeats=5, capacity=bench.points[0].capacity)
    about = {
        "name": bench.name,
        "run": str(folder),
        "model": blueprints[0].network.name,
        "data": spec.name,
        "bench_hash": bench.hash,
        "rounds": bench.rounds,
        "batches": bench.batches,
        "warm_up": bench.warm_up,
        "planned": bench.planned,
        "link": dataclasses.asdict(link),
        "topology": {
            "hosts": 1,
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            "load_average": load_average,
        },
        "environment": environment(),
    }
    (folder / "traces").mkdir()
    with (folder / "measurements.csv").open("w", newline="") as file:
        return _Runner(bench, measure, say, folder, link, about, file).run(blueprints)


@final
class _Runner:
    """The way through the points."""

    def __init__(
        self,
        bench: Bench,
        measure: Measure,
        say: Callable[[str], None],
        folder: Path,
        link: LinkSpeed,
        about: dict[str, Any],
        file: TextIO,
    ) -> None:
        self._bench = bench
        self._measure = measure
        self._say = say
        self._folder = folder
        self._link = link
        self._about = about
        self._file = file
        self._rows = csv.DictWriter(file, COLUMNS)
        self._profiles: dict[tuple[int, str], Profile] = {}
        self._points: list[dict[str, Any]] = []

    def run(self, blueprints: list[Blueprint]) -> Path:
        status, message = "interrupted", None
        self._rows.writeheader()
        try:
            for number, (point, blueprint) in enumerate(zip(self._bench.points, blueprints, strict=True)):
                self._take(number, point, blueprint)
                self._write_result("unfinished", None)
            status = "done"
        except Exception as error:
            status, message = "failed", str(error) if isinstance(error, PipetrglError) else repr(error)
            raise
        finally:
            self._write_result(status, message)
        return self._folder

    def _take(self, number: int, point: Point, blueprint: Blueprint) -> None:
        """Measure one point."""
        terms = Terms(point.workers, self._link, point.capacity, point.config.train.accumulate)
        costs = self._profile(point, blueprint)
        if self._bench.planned:
            blueprint = _with_cuts(blueprint, make_plan(costs, terms, use_all=True).cuts)
        cuts = tuple(sum(block.counted for block in blueprint.blocks(stage)) for stage in range(point.workers))
        self._say(f"point {number + 1} of {len(self._bench.points)}: {_title(point)}, cuts {list(cuts)}")
        outcome = Outcome(number, point, cuts, blueprint.config_hash, predict(costs, terms, cuts), ())
        bench = self._bench
        case = Case(
            config=blueprint.config,
            contenders=point.contenders,
            rounds=bench.rounds,
            batches=bench.batches,
            warm_up=bench.warm_up,
            micro_batches=bench.micro_batches,
        )
        taken: list[Measurement] = []
        measuring = self._measure(case)
        try:
            for one in measuring:
                taken.append(one)
                self._note(outcome, one)
        finally:
            if close := getattr(measuring, "close", None):
                close()  # now, and not when the garbage collector comes: it holds workers
            if taken:
                self._points.append(self._result(dataclasses.replace(outcome, measurements=tuple(taken))))

    def _profile(self, point: Point, blueprint: Blueprint) -> Profile:
        """One for each batch and codec, for these alone change what it measures."""
        key = (point.batch, point.codec)
        if key not in self._profiles:
            self._say(f"profile of {blueprint.network.name}, batch {point.batch}, {point.codec}")
            self._profiles[key] = profile(blueprint.config, blueprint.spec, _REPEATS)
        return self._profiles[key]

    def _note(self, outcome: Outcome, taken: Measurement) -> None:
        self._rows.writerow(csv_row(outcome, taken))
        self._file.flush()
        told = f"{taken.images_per_s:,.1f} images/s" if taken.error is None else f"failed: {taken.error}"
        self._say(f"  round {taken.round + 1} of {self._bench.rounds}  {taken.contender:<22} {told}")

    def _result(self, outcome: Outcome) -> dict[str, Any]:
        """The point's part of the result; its traces become files."""
        result = point_result(outcome)
        for part in result["contenders"]:
            name = part["contender"]
            spans = [one.spans for one in outcome.measurements if one.contender == name and one.spans]
            if spans:
                part["trace"] = f"traces/{outcome.number}-{name.replace('/', '-').replace(' ', '-')}.json"
                content = {"traceEvents": trace_events(spans[-1]), "displayTimeUnit": "ms"}
                write_atomically(self._folder / part["trace"], json.dumps(content).encode())
        return result

    def _write_result(self, status: str, error: str | None) -> None:
        result = {"schema": RESULT_SCHEMA, "command": "bench", "status": status, "error": error, **self._about}
        text = json.dumps({**result, "points": self._points}, indent=2)
        write_atomically(self._folder / "result.json", f"{text}\n".encode())


def _title(point: Point) -> str:
    axes = " and ".join(name for name, lies in (("strong", point.strong), ("weak", point.weak)) if lies)
    workers = "1 worker" if point.workers == 1 else f"{point.workers} workers"
    return f"{axes}, {workers}, batch {point.batch}, capacity {point.capacity}, {point.codec}"


def _with_cuts(blueprint: Blueprint, cuts: list[int]) -> Blueprint:
    config = blueprint.config
    planned = config.model_copy(update={"model": config.model.model_copy(update={"cuts": cuts})})
    return draw_up(planned, blueprint.spec)


def _processor() -> str | None:
    """The model of this machine's processor, where the kernel says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
