"""Values that are not finite: where they arose is named, or the step is left out as if it had never been."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.codecs import CODECS, decode, encode
from pipetrgl.channels.contracts import NullOutbox
from pipetrgl.engine import loop
from pipetrgl.engine.loop import Trainee
from pipetrgl.engine.nonfinite import all_finite, watch
from pipetrgl.engine.phases import Parallel
from pipetrgl.errors import DivergedError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch, Split
from pipetrgl.stage import Stage
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, build_trainee
from tests.equivalence.runs import assert_equal_runs, metrics, run, tiny, weights

CPU = torch.device("cpu")
SKIP = {"on_nonfinite": "skip"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38, 3e38], True),  # the sum overflows, no element does
        ([1.0, math.nan], False),
        ([math.inf, 1.0], False),
        ([math.inf, -math.inf], False),
        ([3e38, 3e38, math.nan], False),
    ],
)
def test_finite_means_every_element(values: list[float], expected: bool) -> None:
    assert all_finite(torch.tensor(values)) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_no_codec_hides_from_the_receiver_that_a_sample_is_not_finite(codec: str, value: float) -> None:
    sent = torch.tensor([[1.0, value], [1.0, 2.0]])
    received = decode(CODECS[codec], encode(CODECS[codec], sent))
    assert isinstance(received, Tensor)
    assert [all_finite(sample) for sample in received] == [False, True]


def job(tmp_path: Path, network: str = "resnet", /, **sections: Any) -> Job:
    config = tiny(network, tmp_path, pipeline={"stages": 1}, **sections)
    return Job(draw_up(config, describe(config)), tmp_path, {})


def batches(job: Job, split: Split = Split.TRAIN) -> list[MicroBatch]:
    with build_loader(job) as loader:
        return [micro_batch for micro_batch in loader if micro_batch.split is split]


def poison(module: nn.Module, value: float = math.nan) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(value)


def finding(stage: Stage, micro_batch: MicroBatch, train: bool = True) -> str:
    with pytest.raises(DivergedError, match="stage 0") as caught:
        watch(stage, "stop").forward(micro_batch, train)
    return str(caught.value)


@pytest.mark.parametrize("model", ["resnet", "vit", "gpt"])  # BatchNorm; dropout and stochastic depth; tokens
@pytest.mark.parametrize("position", [0, 3, -1])
def test_the_first_block_that_is_not_finite_is_named(tmp_path: Path, model: str, position: int) -> None:
    #  finite ─▶ finite ─▶ [NaN] ─▶ NaN ─▶ NaN ─▶ head: NaN
    work = job(tmp_path, model)
    stage = build_stage(work.blueprint, 0, CPU)
    poison(stage.blocks[position])
    name = stage.specs[position].name
    micro_batch = batches(work)[2]
    assert finding(stage, micro_batch) == (
        f"stage 0, block {name}, step {micro_batch.step}: the activation is not finite; lower optim.lr, or raise "
        "objective.transport.tau"
    )


def test_a_head_that_is_not_finite_is_named_with_its_loss(tmp_path: Path) -> None:
    work = job(tmp_path)
    stage = build_stage(work.blueprint, 0, CPU)
    poison(stage.head)
    text = finding(stage, batches(work)[0])
    assert text.startswith("stage 0, the head, step 0: the local loss is nan (task nan, transport ")
    text = finding(stage, batches(work, Split.VALID)[0], train=False)
    assert text.startswith("stage 0, the head, valid after step 0: the logits are not finite; lower optim.lr")


def test_an_input_that_is_not_finite_is_named(tmp_path: Path) -> None:
    work = job(tmp_path)
    micro_batch = batches(work)[0]
    text = finding(
        build_stage(work.blueprint, 0, CPU),
        micro_batch.carrying(torch.full_like(micro_batch.activation, math.inf)),  # type: ignore[arg-type]
    )
    assert text == "stage 0, the input, step 0: the activation is not finite; the images hold such values"


def test_a_transport_cost_that_overflows_is_named_by_block(tmp_path: Path) -> None:
    #  r = 1e25: finite, as the activation and the logits are; r ** 2 is beyond float32
    work = job(tmp_path, "mlp", model={"batch_norm": False})
    stage = build_stage(work.blueprint, 0, CPU)
    with torch.no_grad():
        for parameter in stage.blocks[-1].parameters():
            parameter.fill_(1e25)
        for parameter in stage.head.parameters():
            parameter.zero_()
    text = finding(stage, batches(work)[0])
    name = stage.specs[-1].name
    assert text.startswith(f"stage 0, the transport cost of block {name}, step 0: the local loss is inf (task 1.")


def remembered(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in {**stage.state(), **stage.optimizer_state()}.items()}


def take_step(trainee: Trainee, step: list[MicroBatch]) -> None:
    for micro_batch in step:
        trainee.backward(trainee.forward(micro_batch, True), micro_batch)
    trainee.update()


@pytest.mark.parametrize(("accumulate", "poisoned"), [(1, 0), (2, 0), (2, 1)])
def test_a_skipped_step_leaves_the_stage_as_it_was_before(tmp_path: Path, accumulate: int, poisoned: int) -> None:
    options = {"transport": {"multipliers": {"enabled": True, "every": 1}}}
    work = job(tmp_path, train={**SKIP, "accumulate": accumulate}, objective=options)
    stage, data = build_stage(work.blueprint, 0, CPU), batches(work)
    trainee = watch(stage, "skip")
    steps = [data[first : first + accumulate] for first in range(0, 3 * accumulate, accumulate)]
    take_step(trainee, steps[0])
    before = remembered(stage)
    assert any(name.endswith("running_mean") for name in before)
    assert any(name.endswith(".multiplier") for name in before)
    steps[1][poisoned] = steps[1][poisoned].carrying(steps[1][poisoned].activation * math.nan)  # type: ignore[operator]
    take_step(trainee, steps[1])
    after = remembered(stage)
    assert [name for name in before if not after[name].equal(before[name])] == []
    assert (stage.num_updates, stage.skipped_updates) == (2, 1)
    assert all(parameter.grad is None for _, parameter in stage.named_parameters())
    take_step(trainee, steps[2])
    assert (stage.num_updates, stage.skipped_updates) == (3, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in stage.state().values())
    assert not stage.state()["objective.layer3.3.multiplier"].equal(before["objective.layer3.3.multiplier"])


def skipping(folder: Path, launcher: str, *more: dict[str, Any], **sections: Any) -> Path:
    """Three stages; of steps 8 and 9 the second receives NaN in the first of their two micro-batches."""
    planned = [{"stage": 1, "step": 8, "action": "nan", "num_steps": 2}, *more]
    train = {**SKIP, "accumulate": 2}
    return run(
        tiny(
            "resnet", folder, pipeline={"stages": 3}, train=train, launcher={"name": launcher, "faults": planned},
            **sections,
        )
    )  # fmt: skip


def test_skipping_equals_over_launchers_and_stages_before_it_notice_nothing(tmp_path: Path) -> None:
    serial, threads = skipping(tmp_path / "a", "serial"), skipping(tmp_path / "b", "threads")
    assert_equal_runs(threads, serial)
    result = json.loads((serial / "result.json").read_text())
    assert [stage["skipped_updates"] for stage in result["stages"]] == [0, 2, 2]
    assert [stage["num_steps"] for stage in result["stages"]] == [30, 30, 30]
    options: dict[str, Any] = {"pipeline": {"stages": 3}, "train": {**SKIP, "accumulate": 2}}
    whole = run(tiny("resnet", tmp_path / "c", launcher={"name": "serial"}, **options))
    mine, theirs = weights(serial), weights(whole)
    changed = {name.split(".")[0] for name, tensor in theirs.items() if not mine[name].equal(tensor)}
    assert "conv1" not in changed
    assert "heads" in changed
    rows = metrics(whole)
    for key, row in metrics(serial).items():
        assert key[1] > 0 or row == rows[key]


def test_policies_are_equal_where_every_value_is_finite(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pipeline": {"stages": 2}, "launcher": {"name": "serial"}}
    stop = run(tiny("resnet", tmp_path / "a", **options))
    assert_equal_runs(run(tiny("resnet", tmp_path / "b", train=SKIP, **options)), stop)


def test_the_count_of_skipped_updates_survives_a_resume(tmp_path: Path) -> None:
    checkpoint = {"every": 7, "resume": "auto"}
    undisturbed = skipping(tmp_path / "a", "serial", checkpoint=checkpoint)
    for launcher, step in (("threads", 20), ("serial", 9)):  # 9: between the two, whose row is not written yet
        fault = {"stage": 1, "step": step, "action": "raise"}
        folder = tmp_path / launcher
        with pytest.raises(RuntimeError, match="fault injected"):
            skipping(folder, launcher, fault, checkpoint={"every": 3, "resume": "auto"})
        again = skipping(folder, launcher, fault, checkpoint={"every": 3, "resume": "auto", "keep": 1})
        assert_equal_runs(again, undisturbed)


def test_a_row_is_the_mean_of_the_steps_that_were_not_skipped(tmp_path: Path) -> None:
    launcher = {"name": "serial", "faults": [{"stage": 0, "step": 2, "action": "nan"}]}
    options: dict[str, Any] = {"pipeline": {"stages": 1}, "train": SKIP, "launcher": launcher}
    rows = [metrics(run(tiny("resnet", tmp_path, metrics={"every": every}, **options))) for every in (1, 5)]
    each = [rows[0]["train", 0, step] for step in range(1, 6)]
    assert [row["local_loss"] is None for row in each] == [False, False, True, False, False]
    assert [row["skipped_updates"] for row in each] == [0, 0, 1, 1, 1]
    assert each[2]["accuracy"] is None
    assert each[2]["transport_cost_by_block"] == {}
    five = rows[1]["train", 0, 5]
    for name in ("local_loss", "task_loss", "transport_cost", "accuracy"):
        mean = sum(row[name] for row in each if row[name] is not None) / 4  # all steps hold eight rows
        assert five[name] == pytest.approx(mean, rel=1e-5)  # float32 sums in another order


def train_broken(tmp_path: Path, on_nonfinite: str) -> list[dict[str, Any]]:
    """A stage whose head is NaN from the start, 120 steps, with rows every 50 and two evaluations."""
    train = {"on_nonfinite": on_nonfinite, "max_steps": 120, "epochs": 20}
    evaluate = {"valid_every": 0, "at_start": True}
    work = job(tmp_path, "mlp", train=train, evaluate=evaluate, metrics={"every": 50})
    stage, rows = build_stage(work.blueprint, 0, CPU), []
    poison(stage.head)
    loader = build_loader(work)
    try:
        hooks = build_hooks(work, stage, loader, NullOutbox(), rows.append)
        loop.run(build_trainee(work, stage), loader, NullOutbox(), Parallel(), hooks)
    finally:
        loader.close()
    return rows


def test_a_stage_that_skips_every_step_warns_now_and_then_and_writes_no_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rows = train_broken(tmp_path, "skip")
    assert [row["skipped_updates"] for row in rows if row["kind"] == "train"] == [50, 100, 120]
    for row in rows:
        assert "NaN" not in json.dumps(row)
        if row["kind"] in ("valid", "test", "train"):
            assert row["task_loss"] is None
            assert row["accuracy"] is None
    texts = [text for text in caplog.messages if text.startswith("stage 0")]
    assert texts[0] == "stage 0, valid after step 0: the task loss is nan; the row holds null"
    assert texts[1].startswith("stage 0, the head, step 0: the local loss is nan")
    assert texts[1].endswith("; the step's update is skipped, 1 so far on this stage")
    assert texts[2].startswith("stage 0, the head, step 99: ")
    assert texts[3:] == ["stage 0, test after step 120: the task loss is nan; the row holds null"]


def test_an_evaluation_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="stage 0, the head, valid after step 0: the logits are not finite"):
        train_broken(tmp_path, "stop")


def test_on_cuda_the_rows_stop_the_run(tmp_path: Path) -> None:
    work = job(tmp_path, evaluate={"at_start": False, "valid_every": 0})
    stage = build_stage(work.blueprint, 0, CPU)
    poison(stage.blocks[2])
    stage.device = torch.device("cuda")
    unwatched = watch(stage, "stop")
    assert unwatched is stage
    stage.device = CPU  # there is none here
    with build_loader(work) as loader:
        hooks = build_hooks(work, stage, loader, NullOutbox(), lambda row: None)
        with pytest.raises(DivergedError, match="stage 0, between steps 1 and 5: the local loss is nan"):
            loop.run(unwatched, loader, NullOutbox(), Parallel(), hooks)
