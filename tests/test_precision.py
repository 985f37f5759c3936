"""Half precision: what stays float32, how far it is from float32, and the loss scale of fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipetrgl import precision
from pipetrgl.blueprint import draw_up
from pipetrgl.config.schema import TrainConfig
from pipetrgl.engine.nonfinite import watch
from pipetrgl.errors import DivergedError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.models.batchnorm import BatchNorm2d
from pipetrgl.objective import displacement
from pipetrgl.stage import Stage
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import tiny

CPU = torch.device("cpu")
HALF = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


def stage_and_batches(folder: Path, model: str, form: str, /, **sections: Any) -> tuple[Stage, list[MicroBatch]]:
    """One stage, and its training micro-batches of eight rows."""
    train = {"precision": form, "batch": 8, "accumulate": 1, **sections.pop("train", {})}
    config = tiny(model, folder, pipeline={"stages": 1}, train=train, **sections)
    blueprint = draw_up(config, describe(config))
    with build_loader(Job(blueprint, folder, {})) as loader:
        batches = [micro_batch for micro_batch in loader if micro_batch.split is Split.TRAIN]
    return build_stage(blueprint, 0, CPU), batches


def gradient(stage: Stage, micro_batch: MicroBatch) -> Tensor:
    """Of all parameters, as one vector, the loss scale taken out."""
    output = stage.forward(micro_batch, train=True)
    stage.backward(output, micro_batch)
    scale = float(stage.state().get(f"precision.{stage.last_block}.scale", 1.0))
    return torch.cat([p.grad.flatten() / scale for _, p in stage.named_parameters() if p.grad is not None])


# A number rounds by 2^-9 in bf16 and 2^-12 in fp16 at most. A gradient passes 8 layers with 6 products in each, forward
# and back again, and each rounds its operands and its result: some 200 independent roundings, so about 14 of them. A
# network without ReLU, whose masks flip where a value near 0 is rounded: there the error falls with the root only.
@pytest.mark.parametrize(("form", "rounding"), [("bf16", 2**-9), ("fp16", 2**-12)])
def test_a_gradient_is_as_far_from_float32_as_its_roundings(tmp_path: Path, form: str, rounding: float) -> None:
    stage, (batch, *_) = stage_and_batches(tmp_path, "vit", "fp32")
    exact = gradient(stage, batch)
    rounded = gradient(stage_and_batches(tmp_path, "vit", form)[0], batch)
    assert rounding / 4 < float((rounded - exact).norm() / exact.norm()) < 14 * rounding


@pytest.mark.parametrize(("form", "dtype"), HALF)
def test_all_but_the_inside_of_a_stage_stays_float32(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    stage, (batch, *_) = stage_and_batches(tmp_path, "resnet", form, objective={"transport": {"kind": "displacement"}})
    inside: list[torch.dtype] = []
    for module in (*stage.blocks[1:], stage.head):
        module.register_forward_pre_hook(lambda module, inputs: inside.append(inputs[0].dtype))
    for train in (True, False):
        output = stage.forward(batch, train)
        loss = output.loss
        parts = (output.activation, output.logits, loss.total, loss.task, loss.transport, *loss.by_block)
        assert {part.dtype for part in parts} == {torch.float32}
    assert set(inside) == {dtype}
    gradient(stage, batch)
    stage.update()
    kept = {**stage.state(), **stage.optimizer_state()}
    assert {tensor.dtype for tensor in kept.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("form", "dtype"), HALF)
def test_the_batchnorm_identity_is_float32_under_autocast(form: str, dtype: torch.dtype) -> None:
    norm = BatchNorm2d(3)
    z = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        y, cost = norm.with_mean_square(z)
    assert (y.dtype, cost.dtype) == (dtype, torch.float32)
    # each y is rounded by 2^-9 of itself at most (fp16: less), so each square by twice that; the identity is not
    torch.testing.assert_close(cost, y.float().square().mean(), rtol=2**-8, atol=0)
    (by_identity,) = torch.autograd.grad(1000 * cost, z, retain_graph=True)
    (by_autograd,) = torch.autograd.grad(1000 * torch.nn.BatchNorm2d(3)(z.float()).square().mean(), z)
    assert by_identity.dtype == dtype
    # by autograd in float32, with its own rounding of 2^-24 of terms 1 / eps = 1e5 times larger than their sum
    torch.testing.assert_close(by_identity, by_autograd, rtol=2**-7, atol=1e-2 * float(by_autograd.abs().max()))
    with torch.autocast("cpu", dtype):
        _, measured = norm.eval().with_mean_square(z)
    assert measured.dtype == torch.float32


@pytest.mark.parametrize("name", ["predsim", "infopro"])
def test_rivals_compute_in_float32(tmp_path: Path, name: str) -> None:
    config = tiny("resnet", tmp_path, pipeline={"stages": 2}, train={"precision": "fp16"}, objective={"name": name})
    blueprint = draw_up(config, describe(config))
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        batch = next(micro_batch for micro_batch in loader if micro_batch.split is Split.TRAIN)
    stage = build_stage(blueprint, 0, CPU)
    seen: list[Any] = []
    stage.criterion.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    assert bool(gradient(stage, batch).isfinite().any())
    z, h, _, loss = seen
    assert [tensor.dtype for tensor in (z, h, loss)] == [torch.float32] * 3


def test_a_displacement_is_taken_in_float32() -> None:
    #  256 - 1.0078125 = 254.9921875; bf16 has eight bits and would say 255
    x, y = torch.tensor([[1.0078125]], dtype=torch.bfloat16), torch.tensor([[256.0]], dtype=torch.bfloat16)
    (residual,) = displacement(x, y)
    assert residual.value is not None
    assert residual.value.item() == 254.9921875


def scale_of(stage: Stage) -> tuple[float, int]:
    state = stage.state()
    return tuple(state[f"precision.{stage.last_block}.{name}"].item() for name in ("scale", "growth_tracker"))  # type: ignore[return-value]


def take_step(stage: Stage, batch: MicroBatch, on_nonfinite: str = "stop") -> None:
    trainee = watch(stage, on_nonfinite)
    trainee.backward(trainee.forward(batch, True), batch)
    trainee.update()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_an_overflow_leaves_the_update_out_and_halves_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_nonfinite: str
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**40)
    stage, batches = stage_and_batches(tmp_path, "mlp", "fp16", train={"on_nonfinite": on_nonfinite})
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    take_step(stage, batches[0], on_nonfinite)
    assert scale_of(stage) == (2.0**39, 0)
    assert (stage.num_updates, stage.skipped_updates) == (1, 1)
    assert all(parameter.equal(before[name]) for name, parameter in stage.named_parameters())
    assert stage.optimizer_state() == {}
    assert all(parameter.grad is None for _, parameter in stage.named_parameters())


def test_the_scale_doubles_after_so_many_updates_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 8.0)
    monkeypatch.setattr(precision, "GROWTH_UPDATES", 2)
    stage, batches = stage_and_batches(tmp_path, "mlp", "fp16")
    seen = []
    for batch in batches[:3]:
        take_step(stage, batch)
        seen.append(scale_of(stage))
    assert seen == [(8.0, 1), (16.0, 0), (16.0, 1)]
    assert (stage.num_updates, stage.skipped_updates) == (3, 0)


def test_the_scale_has_no_effect_on_an_update_but_through_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for first in (2.0**4, 2.0**8):
        monkeypatch.setattr(precision, "FIRST_SCALE", first)
        stage, batches = stage_and_batches(tmp_path, "vit", "fp16")
        gradients.append(gradient(stage, batches[0]))
    # numbers below 2^-14 round to a multiple of 2^-24, which is what the scale is for
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 2**-8


def nan_gradients(stage: Stage) -> None:
    for _, parameter in stage.named_parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)


@pytest.mark.parametrize("stops", [True, False])
def test_a_gradient_that_no_scale_makes_finite_stops_the_run_or_is_left_out_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0)
    policy = "stop" if stops else "skip"
    stage, _ = stage_and_batches(tmp_path, "mlp", "fp16", train={"on_nonfinite": policy})
    nan_gradients(stage)
    stage.update()
    assert scale_of(stage)[0] == 1.0
    for count in range(2, 5):
        nan_gradients(stage)
        if stops:
            with pytest.raises(DivergedError, match="stage 0: a gradient is not finite, and no loss scale"):
                stage.update()
            return
        stage.update()
        assert scale_of(stage)[0] == 1.0
        assert stage.skipped_updates == count


def test_float32_has_no_scale_to_save() -> None:
    for form in ("fp32", "bf16"):
        config = TrainConfig.model_validate({"precision": form})
        assert precision.build(config, CPU, 0).state() == {}
