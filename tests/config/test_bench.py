"""A bench file: the grid that its axes make, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipetrgl.config.bench import CONTENDERS, SCHEDULES, BenchSection, load_bench
from pipetrgl.errors import ConfigError
from pipetrgl.studies import contenders
from tests.house.test_house import ROOT, fields

CONFIG = "config:\n  data: {name: synthetic}\n  train: {batch: 48}\n"
BENCHES = [*sorted((ROOT / "benchmarks").glob("*bench.yaml")), ROOT / "benchmarks/scaling.yaml"]


def write(folder: Path, text: str, name: str = "b.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def faults(path: Path) -> list[str]:
    with pytest.raises(ConfigError, match=r"^\d+ problems? in ") as caught:
        load_bench(path)
    return [line.strip() for line in str(caught.value).split("\n")[1:]]


def grid(folder: Path, text: str) -> list[tuple[int, int, int, str, bool, bool]]:
    points = load_bench(write(folder, CONFIG + text)).points
    return [(one.workers, one.batch, one.capacity, one.codec, one.strong, one.weak) for one in points]


def test_strong_scaling_keeps_the_rows_and_weak_scaling_the_rows_a_worker(tmp_path: Path) -> None:
    #          workers   1    2    4        2 x 32 rows lie on both axes, and are measured once
    # strong             64   64   64
    # weak               32   64   128
    axes = "scaling:\n  strong: {workers: [1, 2, 4], batch: 64}\n  weak: {workers: [1, 2, 4], batch_per_worker: 32}\n"
    assert grid(tmp_path, axes) == [
        (1, 64, 4, "fp32", True, False),
        (2, 64, 4, "fp32", True, True),
        (4, 64, 4, "fp32", True, False),
        (1, 32, 4, "fp32", False, True),
        (4, 128, 4, "fp32", False, True),
    ]


def test_without_a_batch_strong_scaling_has_the_configs(tmp_path: Path) -> None:
    assert grid(tmp_path, "scaling: {strong: {workers: [2]}}\n") == [(2, 48, 4, "fp32", True, False)]


def test_capacities_and_codecs_are_tried_where_there_are_links(tmp_path: Path) -> None:
    axes = "scaling: {strong: {workers: [1, 2]}}\ncapacity: [2, 1]\ncodec: [bf16, int8]\n"
    assert [point[:4] for point in grid(tmp_path, axes)] == [
        (1, 48, 2, "bf16"),
        (2, 48, 2, "bf16"),
        (2, 48, 2, "int8"),
        (2, 48, 1, "bf16"),
        (2, 48, 1, "int8"),
    ]


def test_a_contender_takes_part_where_it_makes_sense(tmp_path: Path) -> None:
    axes = "scaling: {strong: {workers: [1, 2]}}\ncodec: [fp32, int8]\n"
    chosen = "contenders: [pipetrgl, stages, independent, serial, end_to_end/threads2, ddp, gpipe]\n"
    bench = load_bench(write(tmp_path, CONFIG + axes + chosen))
    assert [point.contenders for point in bench.points] == [
        ("pipetrgl", "serial", "end_to_end/threads2"),
        ("pipetrgl", "stage 0", "stage 1", "independent", "serial", "end_to_end/threads2", "ddp", "gpipe"),
        ("pipetrgl", "stage 0", "stage 1", "independent", "serial"),
    ]


def test_each_point_has_a_config_of_its_own(tmp_path: Path) -> None:
    base = "config: {model: {cuts: [5, 9]}, pipeline: {stages: 2}, objective: {transport: {tau: [1.0, 2.0]}}}\n"
    bench = load_bench(write(tmp_path, base + "scaling: {weak: {workers: [2]}}\ncuts: [3, 4]\ncodec: [fp16]\n"))
    config = bench.points[0].config
    assert (config.pipeline.stages, config.model.cuts, config.train.batch) == (2, [3, 4], 64)
    assert config.channel.codec == "fp16"
    assert not bench.planned


def test_a_config_is_a_file_or_inherits_from_one(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "train: {batch: 40}\nseed: 3\n", "base.yaml")
    axes = "scaling: {strong: {workers: [2]}}\n"
    (named,) = load_bench(write(tmp_path, f"config: sub/base.yaml\n{axes}")).points
    (inline,) = load_bench(write(tmp_path, f"config: {{defaults: sub/base.yaml, seed: 4}}\n{axes}")).points
    assert (named.config.train.batch, named.config.seed) == (40, 3)
    assert (inline.config.train.batch, inline.config.seed) == (40, 4)


def test_the_resolved_text_loads_to_an_equal_bench(tmp_path: Path) -> None:
    bench = load_bench(
        write(tmp_path, f"{CONFIG}scaling: {{strong: {{workers: [2]}}}}\ncontenders: [pipetrgl, 1f1b]\n")
    )
    assert load_bench(write(tmp_path, bench.text, "again.yaml")) == bench


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        "name: a b\nconfig:\n  train: {epochs: many}\nscaling:\n  strng: {workers: [1]}\n"
        "contenders: [pipetrgl, gpip]\nrounds: 2\nmicro_batchs: [4]\n"
    )
    found = faults(write(tmp_path, text))
    assert [line.split("   ")[0] for line in found] == [f"line {number}" for number in (1, 3, 5, 6, 7, 8)]
    assert "train.epochs: 'many' is a str; expected an integer greater than 0" in found[1]
    assert "scaling.strng: unknown key. Did you mean 'strong'?" in found[2]
    assert "contenders: 'gpip' is not allowed. Did you mean 'gpipe'?" in found[3]
    assert "rounds: 2 is out of range; expected an integer of at least 3" in found[4]
    assert "micro_batchs: unknown key. Did you mean 'micro_batches'?" in found[5]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "config: is missing; expected a file name, or a section of options"),
        ("", "scaling.strong.workers: expected workers here, or under scaling.weak, such as [1, 2]"),
        ("config: [1]\n", "line 1   config: expected a file name, or a section of options"),
        ("config: {}\nscaling: {strong: {workers: [0]}}\n", "line 2   scaling.strong.workers: [0] is not allowed"),
        ("config: {plan: p.json}\n", "line 1   plan: a bench has cuts of its own; remove it, and use cuts: planned"),
        (
            "config: {train: {order: sequential}}\nscaling: {strong: {workers: [2]}}\n",
            "line 1   train.order: a bench measures the parallel order, and this is 'sequential'",
        ),
        (
            f"{CONFIG}scaling: {{strong: {{workers: [2, 4]}}}}\ncuts: [3, 4]\n",
            "line 5   model.cuts: 2 given; pipeline.stages = 4 needs 4 counts, one a stage",
        ),
        (
            f"{CONFIG}scaling: {{strong: {{workers: [2]}}}}\nmicro_batches: [2]\n",
            "line 5   micro_batches: only used with contenders gpipe, 1f1b",
        ),
    ],
)
def test_a_fault_says_where_it_is_and_what_is_allowed(tmp_path: Path, text: str, fault: str) -> None:
    assert any(line.startswith(fault) for line in faults(write(tmp_path, text)))


def test_a_fault_of_an_inherited_config_names_its_file(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\ntrain: {epoch: 3}\n", "base.yaml")
    (fault,) = faults(write(tmp_path, "config: base.yaml\nscaling: {strong: {workers: [2]}}\n"))
    assert fault.startswith("base.yaml:2   train.epoch: unknown key. Did you mean 'epochs'")
    missing = faults(write(tmp_path, "config: nothing.yaml\nscaling: {strong: {workers: [2]}}\n"))
    assert missing[0].startswith("line 1   config: 'nothing.yaml': the file does not exist")


def test_the_contenders_are_those_that_can_take_turns() -> None:
    assert SCHEDULES == contenders.SCHEDULES
    names = ["stage 0" if name == "stages" else name for name in CONTENDERS]
    contenders.require_known(contenders.expanded(names, [4]), 2)


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    for name in sorted(set(fields(BenchSection))):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.name)
def test_every_bench_loads_and_opens_with_an_honest_head(path: Path) -> None:
    load_bench(path)
    head = path.read_text().split("\n\n")[0].lower()
    assert path.read_text().startswith("#")
    for word in ("command", "expected", "time"):
        assert word in head
