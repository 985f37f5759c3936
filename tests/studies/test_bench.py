"""A bench from its file to its page, with measurements that one can count by hand."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.config.bench import Bench, load_bench
from pipetrgl.errors import ConfigError, LaunchError
from pipetrgl.studies import bench as benching
from pipetrgl.studies.bench import run_bench
from pipetrgl.studies.bench_report import HEADER, main_points, table_rows, write_bench_report
from pipetrgl.studies.bench_results import COLUMNS, Outcome, over_slowest_stage, point_result, ratios, spread
from pipetrgl.studies.costs import Cost, LinkSpeed, UnitCost
from pipetrgl.studies.measurement import Case, Measurement, Span
from pipetrgl.studies.planner import Terms
from pipetrgl.studies.prediction import Prediction, predict
from pipetrgl.studies.profile import Profile
from tests.test_cli import pipetrgl

SMALL = """\
name: small
folder: {folder}
config:
  data: {{name: synthetic, shape: [3, 8, 8], samples: 40, valid_fraction: 0.0}}
  model: {{name: mlp, depth: 5, width: 8, head: {{name: pool_linear}}}}
scaling:
  strong: {{workers: [1, 2], batch: 8}}
  weak: {{workers: [1, 2], batch_per_worker: 4}}
codec: [fp32, int8]
contenders: [pipetrgl, stages, serial, ddp, gpipe, zero_bubble]
micro_batches: [2, 4]
rounds: 3
batches: 10
warm_up: 2
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(benching, "measure_link", lambda repeats, capacity: LinkSpeed(1e-4, 4e9))
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(folder=tmp_path / "runs"))
    return load_bench(path)


def turn(contender: str, number: int, seconds: float, workers: int = 2, **changes: Any) -> Measurement:
    """Ten batches of eight rows; each worker waits for a tenth of the time and computes for the rest."""
    spans = [
        span
        for worker in range(workers)
        for batch in range(12)
        for span in (
            Span(worker, "wait", 50 + batch + 0.1 * worker, 50.1 + batch + 0.1 * worker, batch),
            Span(worker, "forward", 50.1 + batch + 0.1 * worker, 50.4 + batch + 0.1 * worker, batch),
            Span(worker, "backward", 50.4 + batch + 0.1 * worker, 51 + batch + 0.1 * worker, batch),
        )
    ]
    values: dict[str, Any] = {
        "rows": 8, "batches": 10, "wait_share": (0.1,) * workers, "cpu_s": (0.5,) * workers,
        "sent_bytes": (1000, *[0] * (workers - 1)), "peak_rss_bytes": (2**20,) * workers,
        "spans": tuple(spans) if number == 2 else (),
    }  # fmt: skip
    return Measurement(contender=contender, round=number, seconds=seconds, **{**values, **changes})


def failed(contender: str, error: str) -> Measurement:
    return Measurement(contender, 0, 0, 0, 0.0, (), (), (), (), (), error)


SECONDS = {"pipetrgl": 4.0, "stage 0": 4.0, "stage 1": 2.0, "serial": 8.0, "ddp": 5.0, "gpipe/M2": 8.0, "gpipe/M4": 6.0}


def faked(case: Case) -> Iterator[Measurement]:
    """Everything takes its SECONDS, a second more in each round; zero-bubble cannot run."""
    workers = case.config.pipeline.stages
    if "zero_bubble" in case.contenders:
        yield failed("zero_bubble", "needs two stages a worker")
    for number in range(case.rounds):
        for kind in case.contenders:
            names = [kind] if kind != "gpipe" else [f"gpipe/M{count}" for count in case.micro_batches]
            for name in names:
                if name in SECONDS:
                    yield turn(name, number, SECONDS[name] + number, workers if name != "serial" else 1)


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "measurements.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_quartiles_lie_between_the_values() -> None:
    assert spread([1.0, 2.0, 4.0]) == {"median": 2.0, "low": 1.5, "high": 3.0}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}
    assert spread([]) is None


def test_ratios_are_taken_within_a_round_and_only_where_both_got_through() -> None:
    #            round 0      round 1      round 2
    # pipetrgl   80 / 4       80 / 5       -
    # serial     80 / 8       80 / 20      80 / 8
    taken = [turn("serial", 0, 8.0), turn("pipetrgl", 0, 4.0), turn("pipetrgl", 1, 5.0), turn("serial", 1, 20.0)]
    assert ratios([*taken, turn("serial", 2, 8.0)], "pipetrgl", "serial") == [2.0, 4.0]
    assert ratios([*taken, failed("ddp", "no")], "pipetrgl", "ddp") == []


def test_the_slowest_stage_is_that_of_each_round() -> None:
    # images/s of stage 0 and 1: 20, 40, then 40, 10: the pipeline's 20 are 1 and 2 times the slower
    taken = [turn("pipetrgl", number, 4.0) for number in range(2)]
    taken += [turn("stage 0", 0, 4.0), turn("stage 1", 0, 2.0), turn("stage 0", 1, 2.0), turn("stage 1", 1, 8.0)]
    assert over_slowest_stage(taken) == [1.0, 2.0]
    assert over_slowest_stage(taken[:-1]) == []


def test_a_point_sums_up_its_rounds(small: Bench) -> None:
    point = small.points[1]
    taken = tuple(
        turn(name, number, seconds) for name, seconds in (("pipetrgl", 4.0), ("serial", 8.0)) for number in (0, 1)
    )
    taken += (turn("pipetrgl", 2, 16.0, wait_share=(None, 0.4)), failed("ddp", "no"))
    found = point_result(Outcome(1, point, (3, 2), "abc", Prediction(25.0, 11.0, (30.0, 25.0)), tuple(taken)))
    mine, serial, ddp = found["contenders"]
    assert mine["images_per_s"] == {"median": 20.0, "low": 12.5, "high": 20.0}
    assert mine["speed_up"]["median"] == 2.0
    assert mine["efficiency"] == 1.0
    assert (mine["predicted_images_per_s"], mine["measured_over_predicted"]) == (25.0, 0.8)
    assert mine["wait_share"] == [0.1, 0.1]  # medians of 0.1, 0.1, None and of 0.1, 0.1, 0.4
    assert (mine["cpu_s_per_batch"], mine["sent_bytes_per_batch"]) == ([0.05, 0.05], [100.0, 0.0])
    assert serial["pipetrgl_over"]["median"] == 2.0
    assert (ddp["error"], ddp["images_per_s"], ddp["rounds"]) == ("no", None, 0)
    assert found["peak_rss_bytes"] == [2**20, 2**20]


def test_a_prediction_is_what_one_counts_by_hand() -> None:
    # units of 3 s, heads of 1 s: stages of 3 + 1 and 6 + 1 s, which hide the link; 16 rows
    cost = Cost(forward_s=1.0, backward_s=2.0)
    units = tuple(UnitCost((f"b{i}",), cost, cost, Cost(forward_s=1.0), 8, 8, 8) for i in range(3))
    found = predict(Profile("net", 16, units, 1.0), Terms(2, LinkSpeed(0.5, 1e9)), (1, 2))
    assert found.stages == (16 / 4, 16 / 7)
    assert found.serial == 16 / 11
    assert found.pipeline == pytest.approx(16 / 7)
    assert (found.of("stage 1"), found.of("ddp")) == (16 / 7, None)


def test_every_measurement_is_a_row_under_the_columns(small: Bench) -> None:
    folder = run_bench(small, faked, lambda line: None)
    rows = lines(folder)
    assert tuple(rows[0]) == COLUMNS
    # points: 1x8 fp32, 2x8 fp32, 2x8 int8, 1x4 fp32; pipetrgl and serial; with 2 workers also two stages; there, with
    # the first codec, ddp, gpipe twice and the row of zero-bubble
    each = {point: sum(row["point"] == point for row in rows) for point in "0123"}
    assert each == {"0": 3 * 2, "1": 3 * 7 + 1, "2": 3 * 4, "3": 3 * 2}
    mine = next(row for row in rows if (row["point"], row["contender"], row["round"]) == ("2", "pipetrgl", "1"))
    assert [mine[name] for name in ("strong", "weak", "workers", "batch", "capacity", "codec", "rows", "batches")] == [
        "true", "true", "2", "8", "4", "int8", "8", "10",
    ]  # fmt: skip
    assert (float(mine["seconds"]), float(mine["images_per_s"]), float(mine["cpu_s"])) == (5.0, 16.0, 1.0)
    assert json.loads(mine["wait_share_by_worker"]) == [0.1, 0.1]
    assert sum(map(int, mine["cuts"].split())) == 5
    (error,) = [row for row in rows if row["error"]]
    assert (error["contender"], error["error"], error["images_per_s"]) == (
        "zero_bubble", "needs two stages a worker", "",
    )  # fmt: skip


def test_the_folder_says_on_what_it_was_measured(small: Bench) -> None:
    folder = run_bench(small, faked, lambda line: None)
    assert re.fullmatch(rf"small-\d{{8}}T\d{{6}}-{small.hash[:4]}", folder.name)
    assert load_bench(folder / "bench.yaml") == small
    result = json.loads((folder / "result.json").read_text())
    assert (result["command"], result["status"], result["rounds"], result["warm_up"]) == ("bench", "done", 3, 2)
    assert result["link"] == {"latency_s": 1e-4, "bytes_per_s": 4e9}
    assert result["topology"]["cores"] >= 1
    assert "git_sha" in result["environment"]
    assert [point["workers"] for point in result["points"]] == [1, 2, 2, 1]
    assert all(re.fullmatch(r"[0-9a-f]{64}", point["config_hash"]) for point in result["points"])


def test_a_trace_has_a_process_for_each_worker_and_begins_at_zero(small: Bench) -> None:
    folder = run_bench(small, faked, lambda line: None)
    events = json.loads((folder / "traces/1-gpipe-M4.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["worker 0", "worker 1"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 12 * 3
    assert min(event["ts"] for event in spans) == 0
    # worker 1's second batch computes forward from 50 + 1 + 0.1 + 0.1 to 0.3 s later
    assert {"name": "forward", "pid": 1, "ts": 1.2e6, "dur": 3e5, "args": {"index": 1}}.items() <= next(
        event for event in spans if (event["pid"], event["name"], event["args"]["index"]) == (1, "forward", 1)
    ).items()


def test_what_was_measured_before_an_interrupt_is_kept(small: Bench) -> None:
    closed = []

    def interrupted(case: Case) -> Iterator[Measurement]:
        try:
            yield turn("pipetrgl", 0, 4.0, case.config.pipeline.stages)
            raise KeyboardInterrupt
        finally:
            closed.append(case.config.pipeline.stages)

    with pytest.raises(KeyboardInterrupt):
        run_bench(small, interrupted, lambda line: None)
    (folder,) = Path(small.folder).iterdir()
    assert [row["contender"] for row in lines(folder)] == ["pipetrgl"]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["points"][0]["contenders"][0]["rounds"] == 1
    assert closed == [1]


def test_an_error_of_the_whole_case_is_the_benchs(small: Bench) -> None:
    def broken(case: Case) -> Iterator[Measurement]:
        yield turn("pipetrgl", 0, 4.0)
        raise LaunchError("worker 1 died")

    with pytest.raises(LaunchError, match="worker 1 died"):
        run_bench(small, broken, lambda line: None)
    (folder,) = Path(small.folder).iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "worker 1 died")


def test_the_page_shows_every_contender_and_says_what_did_not_run(small: Bench) -> None:
    pytest.importorskip("matplotlib")
    folder = run_bench(small, faked, lambda line: None)
    page = write_bench_report(folder).read_text()
    for name in [*SECONDS, "zero_bubble"]:
        assert f"</span>{name}</td>" in page
    assert "did not run: needs two stages a worker" in page
    assert "the first 2 are warm-up and do not count" in page
    assert "1.400 (1.367 to 1.450) times gpipe/M4" in page  # 6 / 4, 7 / 5, 8 / 6
    assert "<script" not in page and not re.findall(r'(?:src|href)="(?!#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    drawn = {path.stem for path in (folder / "plots").iterdir()}
    assert {"speed_up_0", "efficiency_0", "speed_up_1", "predictions", "codecs_2x8", "rates_1", "waits_1"} <= drawn
    # not of 2, which differs by its codec, and not of the points with one worker
    assert {name for name in drawn if name.startswith("timelines")} == {"timelines_1"}


def test_a_table_row_fits_its_header(small: Bench) -> None:
    folder = run_bench(small, faked, lambda line: None)
    points = json.loads((folder / "result.json").read_text())["points"]
    assert [point["point"] for point in main_points(points)] == [0, 1, 3]
    rows = table_rows(points[1])
    assert [row[0] for row in rows] == [
        "pipetrgl", "stage 0", "stage 1", "serial", "ddp", "gpipe/M2", "gpipe/M4", "zero_bubble",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(HEADER), 2}
    # 80 images in 4, 5, 6 s, twice 80 / 8, 9, 10
    assert rows[0][1:4] == ["16.0\n(14.7 to 18.0)", "1.800\n(1.733 to 1.900)", "90.0 %"]
    assert rows[0][6:] == ["10.0 %\n10.0 %", "100.0 ms", "100 B"]


def test_without_matplotlib_numbers_are_there_and_the_page_names_the_extra(
    small: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run_bench(small, faked, lambda line: None)
    assert lines(folder)
    with pytest.raises(ConfigError, match=r"pipetrgl\[plot\]"):
        write_bench_report(folder)


def test_the_command_measures_for_real(tmp_path: Path) -> None:
    """Two workers, and one of torch's schedules that has too few blocks for two stages a worker."""
    text = SMALL.format(folder=tmp_path / "runs").replace("[1, 2], batch: 8", "[2], batch: 8")
    text = text.replace("  weak: {workers: [1, 2], batch_per_worker: 4}\n", "").replace("codec: [fp32, int8]\n", "")
    text = text.replace(
        "[pipetrgl, stages, serial, ddp, gpipe, zero_bubble]", "[pipetrgl, serial, ddp, 1f1b, interleaved_1f1b]"
    )
    (tmp_path / "bench.yaml").write_text(text.replace("depth: 5", "depth: 3").replace("[2, 4]", "[2]"))
    done = pipetrgl(tmp_path, "bench", "bench.yaml")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rows = lines(folder)
    each = {name: sum(row["contender"] == name for row in rows) for name in ("pipetrgl", "serial", "ddp", "1f1b/M2")}
    assert each == {"pipetrgl": 3, "serial": 3, "ddp": 3, "1f1b/M2": 3}
    (refused,) = [row for row in rows if row["error"]]
    assert refused["contender"] == "interleaved_1f1b/M2"
    # stage 0 sends 8 rows of 8 features in fp32, with 8 targets and positions of int64, in each of 10 batches
    mine = next(row for row in rows if row["contender"] == "pipetrgl")
    assert json.loads(mine["sent_bytes_by_worker"])[0] >= 10 * 8 * 8 * 4
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], len(result["points"])) == ("done", 1)
    events = json.loads((folder / "traces/0-pipetrgl.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"forward", "backward", "update", "wait"}
    assert {event["pid"] for event in events} == {0, 1}
    assert f"report: {folder / 'report.html'}" in done.stdout
    assert (folder / "report.html").is_file()


def test_a_bad_file_is_one_message_and_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("config: {train: {batch: 0}}\nscaling: {strong: {workers: [2]}}\nround: 3\n")
    done = pipetrgl(tmp_path, "bench", "bad.yaml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "2 problems in bad.yaml" in done.stderr
    assert "line 1   train.batch: 0 is out of range" in done.stderr
    assert "line 3   round: unknown key. Did you mean 'rounds'?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_network_with_too_few_blocks_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    text = SMALL.format(folder=tmp_path / "runs").replace("[1, 2], batch: 8", "[2, 6], batch: 8")
    (tmp_path / "bench.yaml").write_text(text)
    with pytest.raises(ConfigError, match="6 stages need at least 6 blocks"):
        run_bench(load_bench(tmp_path / "bench.yaml"), faked, lambda line: None)
    assert not (tmp_path / "runs").exists()
