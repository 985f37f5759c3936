"""Optimizer and schedule tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipetrgl.config.schema import OptimConfig
from pipetrgl.optim import build, learning_rate


def rates(total: int = 10, per_epoch: int = 5, **schedule: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, "schedule": schedule})
    return [learning_rate(config, step, per_epoch, total) for step in range(total)]


def test_constant_stays() -> None:
    assert rates() == [1.0] * 10


def test_warm_up_rises_in_equal_steps() -> None:
    #  one epoch of 5 steps: 1/6 .. 5/6, then 1
    assert rates(name="constant", warmup_epochs=1.0) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6] + [1.0] * 5)


def test_cosine_starts_at_one_passes_a_half_in_the_middle_and_ends_near_zero() -> None:
    curve = rates(total=10, name="cosine")
    assert curve[0] == 1.0
    assert curve[5] == pytest.approx(0.5)
    assert 0 < curve[-1] < 0.03
    assert curve == sorted(curve, reverse=True)


def test_one_cycle_rises_from_a_25th_and_ends_at_a_10000th() -> None:
    curve = rates(total=101, name="one_cycle", rise=0.3)
    assert curve[0] == pytest.approx(1 / 25)
    assert max(curve) == pytest.approx(1.0, abs=2e-3)  # the peak falls between two steps
    assert curve.index(max(curve)) in (29, 30)
    assert curve[-1] == pytest.approx(1e-4)


def test_multistep_multiplies_at_each_milestone() -> None:
    curve = rates(total=15, name="multistep", milestones=[1.0, 2.0], factor=0.1)
    assert curve == pytest.approx([1.0] * 5 + [0.1] * 5 + [0.01] * 5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_vectors_and_position_tables_can_be_left_undecayed(name: str) -> None:
    named = [
        ("conv.weight", torch.nn.Parameter(torch.ones(2, 2))),
        ("bn.weight", torch.nn.Parameter(torch.ones(2))),
        ("encoder.pos_embedding", torch.nn.Parameter(torch.ones(1, 2, 2))),
    ]
    config = OptimConfig.model_validate({"name": name, "weight_decay": 0.5, "decay_vectors": False})
    decayed, rest = build(config, named).param_groups
    assert [len(group["params"]) for group in (decayed, rest)] == [1, 2]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
    (everything,) = build(OptimConfig.model_validate({"name": name}), named).param_groups
    assert len(everything["params"]) == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999)}),
    ],
)
def test_outside_of_the_compiler_an_optimizer_is_torchs_own_bit_for_bit(
    name: str, theirs: type[torch.optim.Optimizer], options: dict[str, Any], fused: bool
) -> None:
    mine, other = (torch.nn.Parameter(torch.arange(12.0).view(3, 4)) for _ in range(2))
    more = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    config = OptimConfig.model_validate({"name": name, "lr": 0.1, "weight_decay": 0.01, "fused": fused, **more})
    optimizers = build(config, [("weight", mine)]), theirs([other], lr=0.1, weight_decay=0.01, fused=fused, **options)
    counted: list[int] = []
    optimizers[0].register_step_post_hook(lambda *_: counted.append(1))
    for step in range(3):
        for parameter, optimizer in zip((mine, other), optimizers, strict=True):
            (parameter * (step + 1)).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert torch.equal(mine, other)
        assert mine.grad is None
    assert len(counted) == 3
    assert isinstance(optimizers[0], theirs)
