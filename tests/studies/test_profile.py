"""What the profiler counts exactly; that it measures every unit; and the speed of a real link."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.errors import ConfigError, LaunchError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.studies.link_speed import fit, measure_link
from pipetrgl.studies.profile import profile, saved_bytes
from pipetrgl.worker import build_stage
from tests.equivalence.runs import MODELS, tiny


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_unit_of_every_model_has_its_costs(model: str, tmp_path: Path) -> None:
    config = tiny(model, tmp_path)
    spec = describe(config)
    units = profile(config, spec, repeats=2).units
    network = draw_up(config, spec).network
    assert [name for unit in units for name in unit.blocks] == [block.name for block in network.blocks]
    for unit in units:
        # the optimizer's momentum, the gradient and the weight of each parameter, at least
        assert unit.inner.state_bytes >= 3 * unit.inner.gradient_bytes > 0
        assert unit.head.forward_s > 0
        assert unit.inner.saved_bytes >= unit.output_bytes == unit.wire_bytes
        assert unit.opening.gradient_bytes == unit.inner.gradient_bytes
    rows = config.train.batch // config.train.accumulate
    assert units[0].input_bytes == rows * math.prod(spec.sample_shape) * (8 if model == "gpt" else 4)
    assert [unit.input_bytes for unit in units[1:]] == [unit.output_bytes for unit in units[:-1]]


def test_costs_of_a_stage_add_up_to_those_of_its_units(tmp_path: Path) -> None:
    config = tiny("resnet", tmp_path, pipeline={"stages": 1})
    spec = describe(config)
    units = profile(config, spec, repeats=1).units
    stage = build_stage(draw_up(config, spec), 0, torch.device("cpu"))
    label = torch.zeros(8, dtype=torch.int64)
    batch = MicroBatch(torch.randn(8, 3, 8, 8), label, label, Split.TRAIN, 0, 0, 0, 0, 8, True, False)
    parts = [units[0].opening, *(unit.inner for unit in units[1:]), units[-1].head]
    assert sum(part.gradient_bytes for part in parts) == sum(p.nbytes for _, p in stage.named_parameters())
    # the label and a few scalars of the loss may be counted once or for every unit
    assert sum(part.saved_bytes for part in parts) == pytest.approx(saved_bytes(stage, batch), rel=0.01)


def test_a_codec_that_halves_the_bytes_halves_the_plan_s(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path, channel={"codec": "bf16"})
    assert all(2 * u.wire_bytes == u.output_bytes for u in profile(config, describe(config), repeats=1).units)


def test_an_image_that_rides_along_is_a_part_of_the_plan_s_bytes(tmp_path: Path) -> None:
    config = tiny("resnet", tmp_path, objective={"name": "infopro", "transport": {}})
    units, image = profile(config, describe(config), repeats=1).units, 8 * 3 * 8 * 8 * 4
    assert all(unit.wire_bytes == unit.output_bytes + image for unit in units)
    assert units[0].input_bytes == image
    assert all(unit.input_bytes == before.wire_bytes for before, unit in itertools.pairwise(units))


def test_a_cost_of_whole_stages_cannot_be_planned(tmp_path: Path) -> None:
    config = tiny("mlp", tmp_path, objective={"transport": {"kind": "stage"}})
    with pytest.raises(ConfigError, match="no cost of single blocks"):
        profile(config, describe(config), repeats=1)


def test_a_line_through_two_points_is_the_speed_of_a_link() -> None:
    assert (fit(0, 1.0, 100, 3.0).latency_s, fit(0, 1.0, 100, 3.0).bytes_per_s) == (1.0, 50.0)


def test_a_link_that_seems_faster_with_more_bytes_was_not_measured() -> None:
    with pytest.raises(LaunchError, match="too busy to measure a link: 4 bytes took 2.00 ms, and 9 took 1.00 ms"):
        fit(4, 0.002, 9, 0.001)


def test_a_real_link_has_a_speed() -> None:
    speed = measure_link(repeats=2, capacity=4)
    assert speed.latency_s >= 0 and speed.bytes_per_s > 0
