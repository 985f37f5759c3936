"""Reused micro-batches in the loop: a local step and no more, against the same steps taken by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetrgl import optim
from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.changing import ChangingOutbox
from pipetrgl.channels.contracts import Inbox, NullOutbox, Outbox, WatchedInbox
from pipetrgl.config.schema import FaultConfig
from pipetrgl.data.itinerary import Itinerary
from pipetrgl.engine import loop
from pipetrgl.engine.faults import rehearse
from pipetrgl.engine.phases import Parallel
from pipetrgl.engine.replays import fresh_only, reusing
from pipetrgl.errors import DivergedError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, build_trainee
from tests.channels.test_replaying import Scripted
from tests.equivalence.runs import tiny

LETTERS = "abcdef"
TIMELINE = "ab..cd.e.f."
TAKEN = "abBAcdDeEf"
"""With a ring of 2 and two uses; f closes the run."""


def blueprint_of(folder: Path, **sections: Any) -> Blueprint:
    """One stage, six steps without evaluations, metrics of every second."""
    train = {"order": "replay", "max_steps": 6, "accumulate": 1, "replay": {"size": 2}}
    evaluate = {"valid_every": 0.0, "at_start": False, "test_at_end": False}
    sections = {"pipeline": {"stages": 1}, "metrics": {"every": 2}, "evaluate": evaluate, **sections}
    sections["train"] = train | sections.get("train", {})
    config = tiny("mlp", folder, **sections)
    return draw_up(config, describe(config))


class Seen:
    """An outbox and a hook."""

    waited_s = 0.0
    sent_bytes = 0
    received_index = -1

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.sent: list[int] = []
        self.weights: list[float] = []

    def send(self, micro_batch: MicroBatch) -> None:
        self.sent.append(micro_batch.index)

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self.weights.append(1 / float(self._stage.objective.weight.value()))

    def close(self) -> None:
        pass


def replayed(
    blueprint: Blueprint, folder: Path, timeline: str = TIMELINE
) -> tuple[Stage, Seen, list[dict[str, Any]], list[MicroBatch]]:
    """A stage that met this timeline, what it sent, its rows, and the stream."""
    stage, rows, job = build_stage(blueprint, 0, torch.device("cpu")), [], Job(blueprint, folder, {})
    with build_loader(job) as loader:
        stream = list(loader)
    seen = Seen(stage)
    inbox = reusing(blueprint.config.train, Scripted(timeline, dict(zip(LETTERS, stream, strict=True))))
    hooks: Sequence[loop.Hook] = [*build_hooks(job, stage, inbox, seen, rows.append), seen]
    loop.run(build_trainee(job, stage), inbox, fresh_only(blueprint.config.train, seen), Parallel(), hooks)
    return stage, seen, rows, stream


def by_hand(blueprint: Blueprint, stream: Sequence[MicroBatch], taken: str) -> Stage:
    """The same steps without channel, wrapper, schedule of the stage or loop."""
    stage, config, num_fresh = build_stage(blueprint, 0, torch.device("cpu")), blueprint.config, 0
    itinerary: Itinerary = blueprint.itinerary
    for letter in taken:
        micro_batch = stream[LETTERS.index(letter.lower())]
        stage.backward(stage.forward(micro_batch, train=True), micro_batch)
        for group in stage.optimizer.param_groups:
            # a reused one at the rate of the stream's next step
            group["lr"] = optim.learning_rate(config.optim, num_fresh, itinerary.steps_per_epoch, 6)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        num_fresh += letter.islower()
    return stage


def test_the_weights_are_those_of_the_same_steps_taken_by_hand(tmp_path: Path) -> None:
    blueprint = blueprint_of(tmp_path)  # with dropout: a reused micro-batch meets its first mask again
    stage, _, _, stream = replayed(blueprint, tmp_path)
    expected = by_hand(blueprint, stream, TAKEN).state()
    assert [name for name, tensor in stage.state().items() if not tensor.equal(expected[name])] == []
    other = by_hand(blueprint, stream, LETTERS).state()
    assert any(not tensor.equal(other[name]) for name, tensor in stage.state().items())


def test_the_stream_goes_on_as_if_nothing_had_been_reused(tmp_path: Path) -> None:
    stage, seen, rows, _ = replayed(blueprint_of(tmp_path, checkpoint={"every": 3}), tmp_path)
    assert seen.sent == [0, 1, 2, 3, 4, 5]
    assert (stage.num_updates, stage.num_reused) == (6, 4)
    assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [3, 6]
    #  a b | B A | c d | D e E f: rows follow b, d and f
    train = [row for row in rows if row["kind"] == "train"]
    assert [(row["step"], row["num_reused"]) for row in train] == [(2, 0), (4, 2), (6, 4)]
    (summary,) = [row for row in rows if row["kind"] == "summary"]
    assert (summary["num_steps"], summary["num_reused"]) == (6, 4)


def test_means_are_of_fresh_micro_batches_only(tmp_path: Path) -> None:
    #  b is the only one of the stream before its row; what is reused after it belongs to no row
    blueprint = blueprint_of(tmp_path, optim={"lr": 1e-30, "weight_decay": 0.0}, metrics={"every": 1})
    _, _, rows, _ = replayed(blueprint, tmp_path)
    _, _, alone, _ = replayed(blueprint, tmp_path, LETTERS)
    losses, expected = ([row["task_loss"] for row in each if row["kind"] == "train"] for each in (rows, alone))
    assert losses == expected


def test_a_multiplier_does_not_observe_a_reused_micro_batch(tmp_path: Path) -> None:
    multipliers = {"multipliers": {"enabled": True, "every": 2}}
    _, seen, _, _ = replayed(blueprint_of(tmp_path, objective={"transport": multipliers}), tmp_path)
    changes = [before != after for before, after in zip(seen.weights, seen.weights[1:], strict=False)]
    #                  a b    B      A      c      d     D      e      E      f
    assert changes == [True, False, False, False, True, False, False, False, True]


def test_a_skipped_reuse_is_no_skipped_step_of_the_stream(tmp_path: Path) -> None:
    blueprint = blueprint_of(tmp_path, train={"on_nonfinite": "skip"})
    stage = build_stage(blueprint, 0, torch.device("cpu"))
    job = Job(blueprint, tmp_path, {})
    with build_loader(job) as loader:
        stream = list(loader)
    stream[1] = stream[1].carrying(stream[1].activation * float("nan"))  # type: ignore[operator]
    inbox = reusing(blueprint.config.train, Scripted(TIMELINE, dict(zip(LETTERS, stream, strict=True))))
    rows: list[dict[str, Any]] = []
    hooks = build_hooks(job, stage, inbox, NullOutbox(), rows.append)
    loop.run(build_trainee(job, stage), inbox, NullOutbox(), Parallel(), hooks)
    assert (stage.num_updates, stage.skipped_updates, stage.num_reused) == (6, 1, 4)
    assert [row["skipped_updates"] for row in rows if row["kind"] == "train"] == [1, 1, 1]
    assert all(row["task_loss"] is not None for row in rows if row["kind"] == "train")


def test_a_value_that_is_not_finite_in_a_reused_micro_batch_ends_the_run(tmp_path: Path) -> None:
    blueprint = blueprint_of(tmp_path, optim={"lr": 1e30}, objective={"name": "vangl"})
    with pytest.raises(DivergedError, match="stage 0, .*, step 0: "):
        replayed(blueprint, tmp_path, "a.")


def test_a_fault_happens_before_the_first_forward_pass_only(tmp_path: Path) -> None:
    given: list[MicroBatch] = []

    class Recorded:
        index = 0

        def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
            given.append(micro_batch)
            return None  # type: ignore[return-value]

        def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None: ...

        def update(self) -> None: ...

    blueprint = blueprint_of(tmp_path)
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        stream = dict(zip(LETTERS, loader, strict=True))
    faulty = rehearse(Recorded(), [FaultConfig(stage=0, step=1, action="nan")], tmp_path)
    for micro_batch in reusing(blueprint.config.train, Scripted(TIMELINE, stream)):
        faulty.forward(micro_batch, train=True)
    poisoned = [bool(seen.activation.isnan().any()) for seen in given]  # type: ignore[union-attr]
    assert poisoned == [letter == "b" for letter in TAKEN]


def test_in_another_order_nothing_is_wrapped(tmp_path: Path) -> None:
    parallel = tiny("mlp", tmp_path).train
    inbox: Inbox = Scripted("", {})
    outbox: Outbox = NullOutbox()
    assert reusing(parallel, inbox) is inbox
    assert fresh_only(parallel, outbox) is outbox
    assert isinstance(inbox, WatchedInbox)
    assert isinstance(fresh_only(blueprint_of(tmp_path).config.train, outbox), ChangingOutbox)
