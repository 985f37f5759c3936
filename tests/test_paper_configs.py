"""configs/paper: blocks and parameters of every stage, against sums written out here and totals of torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.load import load
from pipetrgl.data.dataset import DataSpec

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "paper"
SPECS = {
    "stl10": DataSpec("stl10", 4_500, 500, 8_000, (3, 96, 96), 10),
    "cifar10": DataSpec("cifar10", 45_000, 5_000, 10_000, (3, 32, 32), 10),
    "cifar100": DataSpec("cifar100", 45_000, 5_000, 10_000, (3, 32, 32), 100),
    "mnist": DataSpec("mnist_idx", 54_000, 6_000, 10_000, (1, 28, 28), 10),
    "tiny": DataSpec("image_folder", 90_000, 10_000, 10_000, (3, 64, 64), 200),
    "imagenet": DataSpec("image_folder", 1_153_050, 128_117, 50_000, (3, 224, 224), 1_000),
}


@dataclass(frozen=True)
class Counts:
    """What each counted block adds, stem, merges and last norms included, and the map behind it as (channels, side)."""

    parameters: list[int]
    maps: list[tuple[int, int]]

    def by_stage(self, cuts: list[int]) -> list[int]:
        bounds = [0, *(sum(cuts[: k + 1]) for k in range(len(cuts)))]
        return [sum(self.parameters[start:stop]) for start, stop in pairwise(bounds)]

    def heads(self, cuts: list[int], num_classes: int) -> list[int]:
        last = [sum(cuts[: k + 1]) - 1 for k in range(len(cuts))]
        return [conv1(*self.maps[block], num_classes) for block in last]


def conv1(channels: int, side: int, num_classes: int) -> int:
    """Convolution 9 C^2, BatchNorm 2 C, and a linear layer behind an average pool of 16 (maps from 48) or 8."""
    pooled = side // min(16 if side >= 48 else 8, side)
    return 9 * channels**2 + 2 * channels + channels * pooled**2 * num_classes + num_classes


def resnet_110() -> Counts:
    """Convolutions of 9 a b weights, each with a BatchNorm of 2 b; shortcuts of option A have none."""
    blocks = [
        9 * (channels // 2 if first else channels) * channels + 9 * channels**2 + 4 * channels
        for channels, group in ((16, 0), (32, 1), (64, 2))
        for first in [group > 0] + [False] * 17
    ]
    blocks[0] += 9 * 3 * 16 + 2 * 16
    return Counts(blocks, [(channels, side) for channels, side in ((16, 96), (32, 48), (64, 24)) for _ in range(18)])


def bottlenecks(groups: tuple[int, ...], side: int, stem: int) -> Counts:
    """a -> c -> c -> 4 c; the first block of a group has a projection a -> 4 c, and from the second group a stride."""
    blocks, maps, before = [], [], 64
    for group, num_blocks in enumerate(groups):
        channels, out = 64 * 2**group, 256 * 2**group
        for index in range(num_blocks):
            own = before * channels + 9 * channels**2 + channels * out + 2 * (2 * channels + out)
            blocks.append(own + (before * out + 2 * out if index == 0 else 0))
            maps.append((out, side // 2**group))
            before = out
    blocks[0] += 3 * stem**2 * 64 + 2 * 64
    return Counts(blocks, maps)


def vgg_19() -> Counts:
    """Convolutions with bias and BatchNorm: 9 a b + 3 b."""
    channels = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    sides = [64] * 2 + [32] * 2 + [16] * 4 + [8] * 4 + [4] * 4
    blocks = [9 * a * b + 3 * b for a, b in pairwise([3, *channels])]
    return Counts(blocks, list(zip(channels, sides, strict=True)))


def swin_t(side: int) -> Counts:
    """Blocks of 12 c^2 + 13 c and a position table of 13^2 for each head; a merge 4 c -> 2 c with its LayerNorm."""
    blocks, maps = [], []
    for group, num_blocks in enumerate((2, 2, 6, 2)):
        c = 96 * 2**group
        blocks += [12 * c**2 + 13 * c + 13**2 * (c // 32)] * num_blocks
        blocks[-1] += 8 * c**2 + 8 * c if group < 3 else 2 * c
        maps += [(c, side // 4 // 2**group)] * (num_blocks - 1)
        maps.append((min(2 * c, 768), side // 4 // 2 ** min(group + 1, 3)))
    blocks[0] += 16 * 3 * 96 + 96 + 2 * 96
    return Counts(blocks, maps)


def preact(num_blocks: int, in_channels: int, side: int) -> Counts:
    """Two convolutions 64 -> 64, each behind a BatchNorm; the first stage has the stem too."""
    blocks = [2 * 9 * 64**2 + 2 * 2 * 64] * num_blocks
    blocks[0] += 9 * in_channels * 64
    return Counts(blocks, [(64, side)] * num_blocks)


R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
ONE_TO_A_STAGE = {10: [1] * 10, 20: [1] * 20}
EXPERIMENTS: dict[str, tuple[str, Counts, list[int]]] = {
    "stl10-k2": ("stl10", resnet_110(), [27, 27]),
    "stl10-k4": ("stl10", resnet_110(), [14, 14, 13, 13]),
    "stl10-k8": ("stl10", resnet_110(), [7, 7, 7, 7, 8, 6, 6, 6]),
    "stl10-k16": ("stl10", resnet_110(), [4] * 6 + [3] * 10),
    "stl10-k2-equal-memory": ("stl10", resnet_110(), [14, 40]),
    "stl10-k4-equal-memory": ("stl10", resnet_110(), [6, 8, 12, 28]),
    "cifar100-r101": ("cifar100", bottlenecks(R101, 32, stem=3), [17, 16]),
    "cifar100-r152": ("cifar100", bottlenecks(R152, 32, stem=3), [25, 25]),
    "imagenet-r101": ("imagenet", bottlenecks(R101, 56, stem=7), [17, 16]),
    "tiny-r50": ("tiny", bottlenecks(R50, 32, stem=7), [3, 4, 6, 3]),
    "tiny-r101": ("tiny", bottlenecks(R101, 32, stem=7), [7, 9, 9, 8]),
    "tiny-r152": ("tiny", bottlenecks(R152, 32, stem=7), [11, 13, 13, 13]),
    "tiny-vgg19": ("tiny", vgg_19(), [4, 4, 4, 4]),
    "swin-stl10": ("stl10", swin_t(96), [2, 2, 6, 2]),
    "swin-cifar10": ("cifar10", swin_t(32), [2, 2, 6, 2]),
    "swin-cifar100": ("cifar100", swin_t(32), [2, 2, 6, 2]),
    "blockwise-cifar10-sequential": ("cifar10", preact(10, 3, 32), ONE_TO_A_STAGE[10]),
    "blockwise-cifar10-sequential-small": ("cifar10", preact(10, 3, 32), ONE_TO_A_STAGE[10]),
    "blockwise-cifar10-multi-lap": ("cifar10", preact(10, 3, 32), ONE_TO_A_STAGE[10]),
    "blockwise-mnist-parallel": ("mnist", preact(20, 1, 28), ONE_TO_A_STAGE[20]),
    "blockwise-mnist-parallel-small": ("mnist", preact(20, 1, 28), ONE_TO_A_STAGE[20]),
}
"""Data, counts of the network, and residual blocks of each stage as the paper has them."""


def blueprint_of(name: str) -> Blueprint:
    return draw_up(load(FOLDER / f"{name}.yaml"), SPECS[EXPERIMENTS[name][0]])


def stage_parameters(blueprint: Blueprint) -> Iterator[tuple[int, int]]:
    return (blueprint.stage_parameters(stage) for stage in range(blueprint.num_stages))


def test_the_sums_written_out_here_are_those_of_the_paper_and_of_torchvision() -> None:
    #  the trace of tests/models/test_resnet.py, less its heads: 256,602 - 9,610 and 1,517,962 - 37,642
    assert resnet_110().by_stage([27, 27]) == [246_992, 1_480_320]
    assert conv1(64, 24, 10) == 42_762
    #  published totals of torchvision's models, less their classifiers
    assert sum(bottlenecks(R50, 32, stem=7).parameters) == 25_557_032 - (2048 * 1000 + 1000)
    assert sum(bottlenecks(R101, 32, stem=7).parameters) == 44_549_160 - (2048 * 1000 + 1000)
    assert sum(bottlenecks(R152, 32, stem=7).parameters) == 60_192_808 - (2048 * 1000 + 1000)
    classifier = 7 * 7 * 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert sum(vgg_19().parameters) == 143_678_248 - classifier
    assert sum(swin_t(96).parameters) == 28_288_354 - (768 * 1000 + 1000)


def test_every_experiment_is_counted_and_names_itself_in_its_command() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*EXPERIMENTS, "recipe"}
    for name in EXPERIMENTS:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert f"pipetrgl train configs/paper/{name}.yaml" in text
        assert load(FOLDER / f"{name}.yaml").run.name == name
        for line in ("# Reproduces: arXiv 2309.17357, ", "# Time:       never run here; "):
            assert line in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_blocks_and_parameters_of_every_stage(name: str) -> None:
    _, counts, cuts = EXPERIMENTS[name]
    blueprint = blueprint_of(name)
    counted = [sum(spec.counted for spec in blueprint.blocks(stage)) for stage in range(blueprint.num_stages)]
    assert counted == cuts
    blocks, heads = zip(*stage_parameters(blueprint), strict=True)
    assert list(blocks) == counts.by_stage(cuts)
    assert list(heads) == counts.heads(cuts, blueprint.spec.num_classes)


@pytest.mark.parametrize(
    ("name", "taus"),
    [
        ("stl10-k2", [50, 100]),
        ("stl10-k2-equal-memory", [50, 100]),
        ("stl10-k4", [0.5, 0.5, 1, 1]),
        ("stl10-k16", [0.5] * 8 + [1] * 8),
        ("tiny-r50", [5e5, 5e5, 1e6, 1e6]),
        ("swin-stl10", [10] * 4),
    ],
)
def test_tau_of_every_stage_is_the_papers(name: str, taus: list[float]) -> None:
    assert list(blueprint_of(name).taus) == taus


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("blockwise-cifar10-sequential", [50 + 10 * stage for stage in range(10)]),
        ("blockwise-cifar10-multi-lap", 5 * [10 + 2 * stage for stage in range(10)]),
    ],
)
def test_phases_of_one_stage_at_a_time_are_the_papers(name: str, epochs: list[int]) -> None:
    phases = blueprint_of(name).itinerary.sweep.phases
    assert [phase.epochs for phase in phases] == epochs


def test_a_merge_of_swin_belongs_to_the_stage_before_it() -> None:
    blueprint = blueprint_of("swin-stl10")
    last = [blueprint.blocks(stage)[-1].name for stage in range(4)]
    assert last == ["features.2", "features.4", "features.6", "norm"]
