"""The loop, its hooks and what they write."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.contracts import NullOutbox
from pipetrgl.engine import loop
from pipetrgl.engine.checkpoint import write_atomically
from pipetrgl.engine.metrics import log_line
from pipetrgl.engine.phases import Parallel
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage
from tests.equivalence.runs import run, tiny

CPU = torch.device("cpu")


class Recorded:
    """A stage, outbox and hook in one, that notes the order of what the loop does."""

    waited_s = 0.0
    sent_bytes = 0
    index = 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        self.calls.append(f"forward {'train' if train else 'eval'}")
        activation = torch.zeros(1, requires_grad=True) * 1
        return StageOutput(activation, activation, None, ())  # type: ignore[arg-type]

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        self.calls.append("backward")

    def update(self) -> None:
        self.calls.append("update")

    def send(self, micro_batch: MicroBatch) -> None:
        assert isinstance(micro_batch.activation, torch.Tensor)
        assert not micro_batch.activation.requires_grad
        self.calls.append("send")

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self.calls.append("hook")

    def close(self) -> None:
        self.calls.append("close")


def blueprint_of(tmp_path: Path, **sections: Any) -> Blueprint:
    config = tiny("resnet", tmp_path, **sections)
    return draw_up(config, describe(config))


def stream(tmp_path: Path, **sections: Any) -> Iterator[MicroBatch]:
    loader = build_loader(Job(blueprint_of(tmp_path, **sections), tmp_path, {}))
    yield from loader
    loader.close()


def test_a_micro_batch_is_sent_before_its_backward_pass(tmp_path: Path) -> None:
    #  [valid] then one step of two micro-batches, then [valid] and [test] of one micro-batch each
    sections = {"train": {"max_steps": 1, "accumulate": 2}, "evaluate": {"batch": 100, "at_start": False}}
    all_in_one = Recorded()
    inbox = _Listed(list(stream(tmp_path, **sections)))
    loop.run(all_in_one, inbox, all_in_one, Parallel(), [all_in_one])
    train, evaluate = ["forward train", "send", "backward"], ["forward eval", "send", "hook"]
    assert all_in_one.calls == [*train, "hook", *train, "update", "hook", *evaluate, *evaluate, "close", "close"]


class _Listed:
    waited_s = 0.0

    def __init__(self, batches: list[MicroBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def close(self) -> None:
        pass


def one_stage(tmp_path: Path, **sections: Any) -> tuple[Stage, list[dict[str, Any]], list[MicroBatch]]:
    """A single stage run through its whole stream, with its rows."""
    blueprint = blueprint_of(tmp_path, pipeline={"stages": 1}, **sections)
    stage, rows = build_stage(blueprint, 0, CPU), []
    batches = list(stream(tmp_path, **sections))
    inbox, outbox = _Listed(batches), NullOutbox()
    job = Job(blueprint, tmp_path, {})
    loop.run(stage, inbox, outbox, Parallel(), build_hooks(job, stage, inbox, outbox, rows.append))
    return stage, rows, batches


def test_train_rows_come_every_n_steps_and_once_more_for_the_rest(tmp_path: Path) -> None:
    _, rows, _ = one_stage(tmp_path, train={"max_steps": 7}, metrics={"every": 3})
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [3, 6, 7]
    for row in train:
        assert row["local_loss"] == pytest.approx(row["task_loss"] + row["transport_cost"] / (2 * 0.5), rel=1e-5)
        assert sum(row["transport_cost_by_block"].values()) == pytest.approx(row["transport_cost"], rel=1e-5)
        assert 0 <= row["accuracy"] <= 1


def test_a_stream_that_ends_early_writes_no_partial_row_and_its_checkpoint_keeps_the_sums(tmp_path: Path) -> None:
    blueprint = blueprint_of(tmp_path, pipeline={"stages": 1}, metrics={"every": 3})
    stage, rows = build_stage(blueprint, 0, CPU), []
    batches = stream(tmp_path)
    inbox = _Listed(list(itertools.takewhile(lambda batch: batch.step < 5, batches)))
    batches.close()  # type: ignore[attr-defined]
    hooks = build_hooks(Job(blueprint, tmp_path, {}), stage, inbox, NullOutbox(), rows.append)
    loop.run(stage, inbox, NullOutbox(), Parallel(), hooks)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [3]
    saved = safetensors.torch.load_file(tmp_path / "checkpoints" / "step-5" / "stage-0.safetensors")
    (place,) = [tensor for name, tensor in saved.items() if name.startswith("metrics.") and name.endswith(".place")]
    assert place.tolist() == [2 * 8, 5, 0]  # rows since the last row, step, epoch


def test_an_evaluation_counts_every_sample_once_and_trains_nothing(tmp_path: Path) -> None:
    stage, rows, batches = one_stage(tmp_path, train={"max_steps": 1}, evaluate={"batch": 5, "at_start": True})
    evaluations = [row for row in rows if row["kind"] in ("valid", "test")]
    assert [(row["kind"], row["step"], row["num_samples"]) for row in evaluations] == [
        ("valid", 0, 14), ("valid", 1, 14), ("test", 1, 17),
    ]  # fmt: skip
    with torch.no_grad():
        last = [batch for batch in batches if batch.split.label == "test"]
        correct = sum(int((stage.forward(b, False).logits.argmax(1) == b.target).sum()) for b in last)
    assert evaluations[-1]["accuracy"] == correct / 17


def test_accuracy_and_loss_of_a_text_are_means_over_its_bytes(tmp_path: Path) -> None:
    config = tiny("gpt", tmp_path, pipeline={"stages": 1}, train={"max_steps": 12}, metrics={"every": 1})
    job, rows = Job(draw_up(config, describe(config)), tmp_path, {}), []
    with build_loader(job) as loader:
        batches = list(loader)
    stage, inbox, outputs = build_stage(job.blueprint, 0, CPU), _Listed(batches), Outputs()
    hooks = [*build_hooks(job, stage, inbox, NullOutbox(), rows.append), outputs]
    loop.run(stage, inbox, NullOutbox(), Parallel(), hooks)
    for kind, num_rows in (("train", 8), ("valid", 14), ("test", 15)):
        logits, target = outputs.of(kind)
        assert target.shape == (num_rows, 6)
        last = [row for row in rows if row["kind"] == kind][-1]
        right = int((logits.argmax(-1) == target).sum())
        assert right > 0
        assert last["accuracy"] == pytest.approx(right / (num_rows * 6), rel=1e-6)
        if kind != "train":
            loss = -logits.log_softmax(-1).gather(-1, target[..., None]).mean()
            assert last["task_loss"] == pytest.approx(float(loss), rel=1e-5)
            assert last["num_samples"] == num_rows


class Outputs:
    """A hook that keeps what a stage answered after its first step."""

    def __init__(self) -> None:
        self._kept: list[tuple[MicroBatch, torch.Tensor]] = []

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self._kept.append((micro_batch, output.logits.detach()))

    def close(self) -> None:
        pass

    def of(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets of the last pass of one kind."""
        step = max(batch.step for batch, _ in self._kept if batch.split.label == kind)
        some = [(x, batch.target) for batch, x in self._kept if (batch.split.label, batch.step) == (kind, step)]
        logits, targets = zip(*some, strict=True)
        return torch.cat(logits), torch.cat(targets)


def test_gradients_of_accumulated_micro_batches_add_up_to_the_whole_batchs_without_batchnorm(tmp_path: Path) -> None:
    def gradients(accumulate: int) -> list[torch.Tensor]:
        config = tiny("vit", tmp_path, pipeline={"stages": 1}, train={"accumulate": accumulate, "max_steps": 1})
        blueprint = draw_up(config, describe(config))
        stage = build_stage(blueprint, 0, CPU)
        for batch in build_loader(Job(blueprint, tmp_path, {})):
            if batch.split.label == "train":
                stage.backward(stage.forward(batch, True), batch)
        return [parameter.grad for _, parameter in stage.named_parameters() if parameter.grad is not None]

    # dropout and stochastic depth included: masks belong to rows of the step, not to micro-batches
    for whole, parts in zip(gradients(1), gradients(3), strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_a_log_line_shows_everything_and_no_number_for_what_is_absent() -> None:
    row = {
        "stage": 1, "replica": 0, "step": 1200, "local_loss": 1.832, "task_loss": 1.790, "accuracy": 0.643,
        "transport_cost": 0.084, "weight": 0.5, "images_per_s": 4210.0, "wait_share": 0.03,
    }  # fmt: skip
    line = "s1/4 r0/1 step 1200 | local 1.832 (task 1.790, transport 0.042) | head acc 64.3 % | "
    assert log_line(row, 4) == line + "4210 img/s | waited 3 %"
    assert log_line({**row, "images_per_s": None, "wait_share": None}, 4) == line + "- img/s | waited -"
    skipped = {**row, "local_loss": None, "task_loss": None, "accuracy": None, "skipped_updates": 3}
    assert log_line(skipped, 4) == "s1/4 r0/1 step 1200 | every update skipped | 4210 img/s | waited 3 %"


def test_a_run_leaves_result_trace_manifest_and_metrics(tmp_path: Path) -> None:
    folder = run(
        tiny("resnet", tmp_path, pipeline={"stages": 2}, launcher={"name": "threads"}, trace={"first_step": 3})
    )
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["num_steps"], result["launcher"], result["last_head"]) == (
        "done",
        30,
        "threads",
        1,
    )
    assert result["best_head"] in (0, 1)
    for stage in result["stages"]:
        shares = stage["compute_share"] + stage["wait_share"] + stage["send_wait_share"]
        assert shares == pytest.approx(1)
        assert 0 <= stage["test_accuracy"] <= 1
    assert result["stages"][0]["bytes_sent"] > 0
    assert result["stages"][1]["bytes_sent"] == 0
    manifest = json.loads((folder / "checkpoints/step-30/manifest.json").read_text())
    assert sorted(manifest["files"]) == ["stage-0.safetensors", "stage-1.safetensors"]
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} == {"wait", "forward", "send", "backward", "update"}
    assert {event["pid"] for event in spans} == {0, 1}
    assert {event["args"]["step"] for event in spans} == set(range(3, 23))


def test_spans_of_a_worker_follow_one_another(tmp_path: Path) -> None:
    folder = run(tiny("resnet", tmp_path, pipeline={"stages": 2}))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sent, arrived = {}, {}
    for rank in range(2):
        spans = sorted((e for e in events if e["ph"] == "X" and e["pid"] == rank), key=lambda e: e["ts"])
        for before, after in itertools.pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"] + 1  # microseconds, rounded to a tenth
        name, book = ("send", sent) if rank == 0 else ("forward", arrived)
        book.update({e["args"]["index"]: e["ts"] for e in spans if e["name"] == name})
    # clocks are aligned to half a round trip, about 0.1 ms here: nothing is used 2 ms before it was sent
    assert all(arrived[index] > sent[index] - 2000 for index in sent.keys() & arrived.keys())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_worker_keeps_only_its_own_stage(tmp_path: Path) -> None:
    blueprint = blueprint_of(tmp_path, pipeline={"stages": 4})
    names = [set(build_stage(blueprint, index, CPU).state()) for index in range(4)]
    for one in range(4):
        for other in range(one):
            assert not names[one] & names[other]
    whole = blueprint_of(tmp_path, pipeline={"stages": 1})
    bodies = {name for stage in names for name in stage if not name.startswith("heads.")}
    assert bodies == {name for name in build_stage(whole, 0, CPU).state() if not name.startswith("heads.")}


def saved_bytes(tmp_path: Path, objective: dict[str, Any]) -> int:
    """Bytes of activations that one training forward keeps for its backward; each storage once, no parameters."""
    blueprint = blueprint_of(tmp_path, pipeline={"stages": 2}, objective=objective)
    stage = build_stage(blueprint, 0, CPU)
    batch = next(batch for batch in stream(tmp_path) if batch.split.label == "train")
    own = {tensor.untyped_storage().data_ptr() for tensor in stage.state().values()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage.forward(batch, True)
        total = sum(saved.values())
    del output
    return total


def test_the_batchnorm_identity_saves_no_more_activation_bytes_than_plain_greedy_learning(tmp_path: Path) -> None:
    vangl = saved_bytes(tmp_path, {"name": "vangl"})
    identity = saved_bytes(tmp_path, {"transport": {"impl": "batchnorm", "tau": 0.5}})
    stored = saved_bytes(tmp_path, {"transport": {"impl": "autograd", "tau": 0.5}})
    scalars = 64  # the loss's own scalars: a handful of 4-byte numbers, whatever the network
    assert vangl <= identity <= vangl + scalars
    assert stored > vangl + 1000


def test_a_run_with_the_identity_learns_as_one_with_stored_residuals(tmp_path: Path) -> None:
    def last_loss(impl: str) -> float:
        options = {"transport": {"impl": impl, "tau": 0.5}}
        _, rows, _ = one_stage(tmp_path, objective=options, train={"max_steps": 3}, metrics={"every": 3})
        return float(next(row for row in rows if row["kind"] == "train")["local_loss"])

    assert math.isclose(last_loss("batchnorm"), last_loss("autograd"), rel_tol=1e-5)  # float32, three steps
