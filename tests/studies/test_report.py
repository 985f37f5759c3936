"""The report of a run: complete, honest about what is absent, safe to open."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pipetrgl.errors import ConfigError
from pipetrgl.studies.record import read_run
from pipetrgl.studies.report import write_report
from pipetrgl.studies.tables import (
    ENERGY_HEADER,
    GEOMETRY_HEADER,
    TABLE_HEADER,
    energy_rows,
    geometry_rows,
    stagnation_line,
    table_rows,
)
from pipetrgl.studies.wording import ABSENT, duration, number

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def train_row(stage: int, step: int, local_loss: float = 2.0, replica: int = 0) -> dict[str, Any]:
    blocks = {f"layer{stage}.0": 0.5, f"layer{stage}.1": 0.25}
    return {
        **{"kind": "train", "stage": stage, "replica": replica, "step": step, "epoch": 0, "local_loss": local_loss},
        **{"task_loss": 1.5, "transport_cost": 0.75, "transport_cost_by_block": blocks, "weight": 0.5},
        **{"accuracy": 0.1, "images_per_s": 640.0, "wait_share": 0.03, "lr": 0.01},
    }


def score_row(stage: int, step: int, accuracy: float, kind: str = "valid") -> dict[str, Any]:
    return {"kind": kind, "stage": stage, "step": step, "epoch": 0, "accuracy": accuracy, "num_samples": 600}


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def interrupted_run(run: Path, num_stages: int = 2) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text(
        f"run: {{name: small}}\npipeline: {{stages: {num_stages}}}\nlauncher: {{name: local}}\n"
    )
    stages = range(num_stages)
    rows = [train_row(stage, step) for step in (10, 20) for stage in stages]
    write_rows(run, rows + [score_row(stage, 20, 0.5 + stage / 100) for stage in stages])
    return run


def stage_result(stage: int) -> dict[str, Any]:
    return {
        **{"stage": stage, "blocks": [f"layer{stage}.0", f"layer{stage}.1"], "valid_accuracy": 0.875},
        **{"test_accuracy": 0.8125, "local_loss": 0.61, "transport_cost": 0.02, "images_per_s": 523.4},
        **{"transport_cost_by_block": {f"layer{stage}.0": 0.02}, "wait_share": 0.05, "bytes_sent": 2_000_000},
    }


def result(num_stages: int, **changes: Any) -> dict[str, Any]:
    stages = [stage_result(stage) for stage in range(num_stages)]
    whole = {"status": "done", "name": "small", "launcher": "local", "num_stages": num_stages, "stages": stages}
    return {**whole, "best_head": 0, "last_head": num_stages - 1, "environment": {"git_sha": None}, **changes}


def finished_run(run: Path, num_stages: int = 2, **changes: Any) -> Path:
    """Forward 2 ms, backward 3 ms, every 10 ms; each stage starts 2 ms after the one before it."""
    interrupted_run(run, num_stages)
    events: list[dict[str, Any]] = []
    for stage in range(num_stages):
        events.append({"name": "process_name", "ph": "M", "pid": stage, "args": {"name": f"stage {stage}"}})
        for index in range(8):
            place = {"ph": "X", "cat": "compute", "pid": stage, "tid": 0, "args": {"step": index, "index": index}}
            start = 10_000 * index + 2_000 * stage
            events.append({"name": "forward", "ts": start, "dur": 2_000, **place})
            events.append({"name": "backward", "ts": start + 2_000, "dur": 3_000, **place})
    (run / "trace.json").write_text(json.dumps({"traceEvents": events}))
    (run / "result.json").write_text(json.dumps(result(num_stages, **changes)))
    return run


@pytest.mark.parametrize("num_stages", [1, 4, 17])
def test_the_report_of_a_full_run_names_every_stage(tmp_path: Path, num_stages: int) -> None:
    page = write_report(finished_run(tmp_path / "run", num_stages)).read_text()
    for stage in range(num_stages):
        assert f"layer{stage}.0 .. layer{stage}.1" in page  # the table
        assert re.search(rf"<text[^>]*>stage {stage}</text>", page)  # the timeline
    assert (tmp_path / "run/plots/timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network_and_no_scripts(tmp_path: Path) -> None:
    page = write_report(finished_run(tmp_path / "run")).read_text()
    assert "<script" not in page
    assert "@import" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_an_interrupted_run_is_reported_from_its_metrics(tmp_path: Path) -> None:
    page = write_report(interrupted_run(tmp_path / "run")).read_text()
    assert "unfinished" in page
    assert "No trace was recorded" in page
    assert "51.0 %" in page
    assert "Use the head of <strong>stage 1</strong>" in page


def test_the_report_counts_what_was_reused_beside_the_steps(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    whole = result(2)
    for stage, counts in zip(whole["stages"], ((680, 0), (680, 120)), strict=True):
        stage["num_steps"], stage["num_reused"] = counts
    (run / "result.json").write_text(json.dumps(whole))
    page = write_report(run).read_text()
    assert "<td>680</td>" in page
    assert "<td>680 and 120 reused</td>" in page


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    complete = read_run(run).rows
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "train", "stage": 0, "name": "é'.encode()[:-1])
    assert read_run(run).rows == complete
    write_report(run)


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"kind": "tra\n{}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 1: not JSON"):
        write_report(run)


def test_values_are_escaped(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", name="<script>alert(1)</script>", error="<b>", launcher="&")
    (run / "config.yaml").write_text("run: {name: '</pre><i>'}\n")
    page = write_report(run).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not any(markup in page for markup in ("<script", "<b>", "<i>"))


def test_a_block_name_is_escaped_in_the_drawing_too(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    write_rows(run, [{**train_row(0, 10), "transport_cost_by_block": {"<u>$x$": 1.0}}])
    page = write_report(run).read_text()
    assert "<u>" not in page
    assert "&lt;u&gt;$x$</text>" in page


def test_missing_values_are_an_en_dash_and_never_a_number() -> None:
    row = table_rows({"stages": [{"stage": 0, "valid_accuracy": None}], "best_head": None, "last_head": 0})[0]
    assert len(row) == len(TABLE_HEADER)
    assert row == ["0", *[ABSENT] * 7, "last"]


def test_the_table_marks_the_head_to_use() -> None:
    rows = table_rows(result(2))
    assert rows[0] == ["0", "layer0.0 .. layer0.1", "87.5 %", "81.2 %", "0.610", "0.0200", "523", "5.0 %", "best"]
    assert rows[1][-1] == "last"


def test_heads_are_compared_only_once_all_have_been_validated(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    write_rows(run, [score_row(0, 20, 0.7), score_row(1, 20, 0.6), score_row(0, 40, 0.4)])
    found = read_run(run).result
    assert found["best_head"] == 0
    assert [stage["valid_accuracy"] for stage in found["stages"]] == [0.7, 0.6]


def test_a_run_that_failed_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", status="failed", stages=[], best_head=None, error="stage 1: out of memory")
    (run / "metrics.jsonl").unlink()
    (run / "trace.json").write_text('{"traceEvents": []}')
    page = write_report(run).read_text()
    assert "out of memory" in page
    assert "No head is recommended" in page
    assert "<svg" not in page


def test_a_diverged_loss_is_shown_as_nan(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    write_rows(run, [train_row(0, 10, local_loss=float("nan"))])
    assert ">nan<" in write_report(run).read_text()


def test_a_second_report_leaves_no_plot_that_it_cannot_draw(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_report(run)
    (run / "trace.json").unlink()
    write_report(run)
    assert not (run / "plots/timeline.png").exists()


def test_the_report_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(interrupted_run(tmp_path / "run"))
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib; install the extra: pip install 'pipetrgl\[plot\]'"):
        write_report(tmp_path)


def test_a_folder_without_config_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no config\.yaml"):
        write_report(tmp_path)


def test_numbers_keep_three_digits_and_durations_read_aloud() -> None:
    assert [number(value) for value in (0.0, 1.98, 0.02, float("inf"))] == ["0", "1.98", "0.0200", "inf"]
    assert [duration(value) for value in (9.04, 95.2, 7500.0)] == ["9.0 s", "1 min 35 s", "2 h 05 min"]


def test_the_energy_is_a_mean_over_the_last_epoch_of_each_stage() -> None:
    #  stage 0: cross-entropy (2 + 4) / 2 = 3; stage 1: 2 + 0.5 * 4 = 4, above 3; epoch 0 takes no part
    def row(stage: int, epoch: int, task: float, cost: float, weight: float = 0.5) -> dict[str, Any]:
        about = {"kind": "train", "stage": stage, "epoch": epoch}
        return about | {"task_loss": task, "transport_cost": cost, "weight": weight}

    rows = [row(0, 0, 9.0, 9.0), row(0, 1, 2.0, 1.0), row(0, 1, 4.0, 3.0), row(1, 0, 1.0, 0.0), row(1, 1, 2.0, 4.0)]
    first, second = energy_rows(rows, 2)
    assert first == ["0", "3.00", "1.00", "4.00", ABSENT, ABSENT]
    assert second == ["1", "2.00", "2.00", "4.00", "3.00", "rises"]
    assert len(first) == len(ENERGY_HEADER)
    plain = [{**each, "weight": 0.0} for each in rows]  # as VanGL and the rivals write it
    assert energy_rows(plain, 2)[1] == ["1", "2.00", "0", "2.00", "3.00", "falls"]
    assert energy_rows(rows, 3) == []


def test_the_stagnation_index_needs_every_head() -> None:
    assert "12.5 points" in stagnation_line([{"valid_accuracy": 0.75}, {"valid_accuracy": 0.625}])
    assert "no validation" in stagnation_line([{"valid_accuracy": 0.75}, {"valid_accuracy": None}])


def test_the_diagnostics_are_explained_where_there_are_stages_to_compare(tmp_path: Path) -> None:
    page = write_report(finished_run(tmp_path / "two")).read_text()
    assert "Stagnation index: 0.0 points" in page
    assert "Training means over each stage's last epoch." in page
    assert "Diagnostics" not in write_report(finished_run(tmp_path / "one", 1)).read_text()


def test_the_geometry_names_the_block_that_moves_most() -> None:
    geometry = {
        "straightness": 0.5,
        "monotone_share": None,  # the stage changes the shape
        "monotone_share_by_block": {"layer1.0": 1.0, "layer1.1": 0.75},
        "relative_cost_by_block": {"layer1.0": 0.125, "layer1.1": 2.5, "layer2.0": None},
    }
    rows = geometry_rows([{"stage": 0}, {"stage": 1, "geometry": geometry}])
    assert rows == [["1", "0.500", ABSENT, "75.0 %", "2.50", "layer1.1"]]
    assert len(rows[0]) == len(GEOMETRY_HEADER)


def test_the_geometry_of_a_run_that_was_interrupted_is_reported(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path / "run")
    row = {"kind": "geometry", "stage": 1, "step": 20, "straightness": 0.25, "monotone_share": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "monotone_share_by_block": {}, "relative_cost_by_block": {"b": 0.5}}) + "\n")
    page = write_report(run).read_text()
    assert "Pairs in order" in page and "0.250" in page
    assert (run / "plots/relative_cost_by_block.png").is_file()
