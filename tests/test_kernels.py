"""Recompute, channels_last, compile and fused optimizers: the same numbers, by other ways."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrgl import kernels, optim
from pipetrgl.blocks import BlockOutput
from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.schema import Config, OptimConfig, TrainConfig
from pipetrgl.errors import LaunchError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.models.resnet import BasicBlock
from pipetrgl.stage import Stage
from pipetrgl.studies.footprint import count_saved
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import tiny

CPU = torch.device("cpu")
TORCHS_OWN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
"""Of the compiler's imports, and of its tracing."""


def drawn(folder: Path, model: str, /, stages: int = 1, **train: Any) -> Blueprint:
    config = tiny(model, folder, pipeline={"stages": stages}, train={"batch": 8, "accumulate": 1, **train})
    return draw_up(config, describe(config))


def first_batch(folder: Path, blueprint: Blueprint) -> MicroBatch:
    with build_loader(Job(blueprint, folder, {})) as loader:
        return next(micro_batch for micro_batch in loader if micro_batch.split is Split.TRAIN)


def trained(stage: Stage, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The activation, and every gradient and buffer after one backward pass."""
    output = stage.forward(batch, train=True)
    stage.backward(output, batch)
    after = {name: parameter.grad for name, parameter in stage.named_parameters() if parameter.grad is not None}
    return output.activation.detach(), after | stage.state()


@pytest.mark.parametrize("model", ["resnet", "resnet_preact", "vgg", "mlp", "vit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit_and_counts_a_batch_once(tmp_path: Path, model: str, precision: str) -> None:
    plain, recomputed = (drawn(tmp_path, model, recompute=on, precision=precision) for on in (False, True))
    batch = first_batch(tmp_path, plain)
    activation, after = trained(build_stage(plain, 0, CPU), batch)
    again, after_again = trained(build_stage(recomputed, 0, CPU), batch)
    assert again.equal(activation)
    assert [name for name, tensor in after.items() if not tensor.equal(after_again[name])] == []
    counts = {int(tensor) for name, tensor in after_again.items() if name.endswith("num_batches_tracked")}
    assert counts == ({1} if model in ("resnet", "resnet_preact", "vgg", "mlp") else set())


def test_recomputing_keeps_the_input_of_every_block_and_no_more(tmp_path: Path) -> None:
    #  x ─▶ stem ─▶ 1.0 ─▶ 1.1 ─▶ ... ─▶ 3.3 ─▶ head       saved before the head: every block's output but the last one
    plain, recomputed = (drawn(tmp_path, "resnet", recompute=on) for on in (False, True))
    inputs = 4 * 8 * sum(math.prod(shape) for shape in recomputed.shapes[:-1])
    assert count_saved(recomputed, 0, rows=8).blocks == inputs
    assert count_saved(plain, 0, rows=8).blocks > 3 * inputs  # conv, BatchNorm, ReLU, conv, BatchNorm, ReLU


def test_a_backward_that_ends_early_still_sets_the_statistics_back() -> None:
    #  two BatchNorms: torch ends the second forward pass as soon as all that the backward needs is there again
    block = BasicBlock(3, 3, stride=1, option_a=True, identity=True)
    (call,) = kernels.calls(TrainConfig(recompute=True), [block], CPU)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    output = call(x)
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    output.activation.sum().backward()  # type: ignore[no-untyped-call]
    assert int(before["bn1.num_batches_tracked"]) == 1
    assert all(buffer.equal(before[name]) for name, buffer in block.named_buffers())
    assert any(bool(value.ne(0).any()) for name, value in before.items() if name.endswith("running_mean"))


def test_channels_last_changes_the_layout_and_only_the_order_of_sums(tmp_path: Path) -> None:
    plain, turned = (drawn(tmp_path, "resnet", channels_last=on) for on in (False, True))
    batch = first_batch(tmp_path, plain)
    stage = build_stage(turned, 0, CPU)
    layouts: list[bool] = []
    for block in stage.blocks:
        block.register_forward_hook(
            lambda module, inputs, output: layouts.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
                and output.activation.is_contiguous(memory_format=torch.channels_last)
            )
        )
    expected, _ = trained(build_stage(plain, 0, CPU), batch)
    activation, _ = trained(stage, batch)
    assert layouts == [True] * len(stage.blocks)
    weights = [parameter for _, parameter in stage.named_parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    # sums of up to 9 * 16 products, each product and sum rounding by 2^-24, one after another in 25 convolutions
    assert float((activation - expected).norm() / expected.norm()) < 25 * 9 * 16 * 2**-24


@pytest.mark.parametrize("strides", [(3, 1, 1, 1), (3, 1, 3, 3)])
def test_maps_of_one_pixel_have_the_same_strides_whatever_brought_them(strides: tuple[int, ...]) -> None:
    #  both are contiguous in both formats, but kernels take the one for the first and the other for the second
    seen: list[tuple[int, ...]] = []

    def block(x: Tensor) -> BlockOutput:
        seen.append(x.stride())
        return BlockOutput(x)

    x = torch.zeros(24).as_strided((8, 3, 1, 1), strides)
    kernels.ChannelsLast(block)(x)
    assert seen == [(3, 1, 3, 3)]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_optimizers_differ_by_a_few_roundings(name: str) -> None:
    options: dict[str, Any] = {"name": name, "lr": 0.1, "weight_decay": 0.01}
    options |= {"nesterov": True} if name == "sgd" else {}
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(50, generator=generator), torch.randn(3, 50, generator=generator)
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone())
        optimizer = optim.build(OptimConfig.model_validate({**options, "fused": fused}), [("w", parameter)])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    # three updates of some ten operations each, each rounding by 2^-24 of numbers of order 1
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=30 * 2**-24 * 4)


def tracing(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """torch.compile with another backend: generating and building C++ takes 15 s of processor time for one block.

    What is ours is tested: that blocks can be traced, into how many graphs, and that these compute the same. The real
    backend runs in benchmarks/options.py.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


@TORCHS_OWN_WARNINGS
def test_a_traced_block_is_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing(monkeypatch, "aot_eager")
    block = BasicBlock(3, 3, stride=1, option_a=True, identity=True)
    names = list(block.state_dict())
    (call,) = kernels.calls(TrainConfig(compile=True, recompute=True), [block], CPU)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for run in (block, call):
        output = run(x)
        (residual,) = output.residuals
        assert residual.mean_square is not None
        loss = output.activation.square().sum() + 100 * residual.mean_square
        results.append([loss, *torch.autograd.grad(loss, tuple(block.parameters()))])
    assert list(block.state_dict()) == names
    assert int(block.bn2.num_batches_tracked) == 2  # type: ignore[arg-type]
    # sums of 100 pixels' terms of order 1 to 100 in another order, rounding by 2^-24 each
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=100 * 2**-24, atol=100 * 100 * 2**-24)


@TORCHS_OWN_WARNINGS
@pytest.mark.parametrize(("model", "most"), [("resnet", 7), ("vit", 8)])
def test_blocks_of_a_kind_are_compiled_once_and_no_step_compiles_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, most: int
) -> None:
    #  resnet of 12 blocks: the probe, the stem, one that keeps its shape for each of three groups, two that halve it;
    #  vit of 8 layers: the probe, and pieces of the stem and of a layer between one dropout and the next
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    tracing(monkeypatch, count)
    blueprint = drawn(tmp_path, model, compile=True)
    stage = build_stage(blueprint, 0, CPU)
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        batches = [each for each in loader if each.split is Split.TRAIN and each.num_rows == 8]
    counts = []
    for batch in batches[:6]:  # dropout has another seed in each
        trained(stage, batch)
        counts.append(len(graphs))
    assert counts == [len(graphs)] * 6
    assert 3 <= len(graphs) <= most
    with torch.no_grad():
        stage.forward(batches[0], train=False)
    assert len(graphs) == counts[0]  # an evaluation is not compiled


def test_a_machine_without_a_compiler_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(
        LaunchError, match=r"train\.compile: .* \(RuntimeError: InvalidCxx[^\n]*found\); it needs a C\+\+"
    ):
        build_stage(drawn(tmp_path, "mlp", compile=True), 0, CPU)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            {"train": {"channels_last": True}, "model": {"name": "mlp"}},
            "train.channels_last: .* has no maps to lay out",
        ),
        ({"train": {"precision": "fp16"}, "optim": {"fused": True}}, "optim.fused: not for sgd with momentum and"),
    ],
)
def test_what_cannot_work_is_refused(content: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Config.model_validate(content)


def test_fused_sgd_still_forgets_to_set_its_momentum() -> None:
    #  the reason for that refusal; once this fails, torch is mended and the rule can go
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (math.inf, 1.0):
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor == math.inf:  # left out, but the buffer is there: memory that nobody has set, perhaps zeros by chance
            optimizer.state[parameter]["momentum_buffer"].fill_(7.0)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() != [1.0, 1.0]
