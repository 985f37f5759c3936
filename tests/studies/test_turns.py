"""Contenders that take turns: all train the same network, every turn is counted, and a failure ends all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.board import Board
from pipetrgl.config.load import dump
from pipetrgl.config.schema import Config
from pipetrgl.errors import ConfigError, DivergedError, LaunchError
from pipetrgl.launchers.crew import Crew
from pipetrgl.launchers.membership import Membership
from pipetrgl.launchers.start import describe
from pipetrgl.studies.contenders import SCHEDULES, Seat, expanded, require_known
from pipetrgl.studies.end_to_end import EndToEnd
from pipetrgl.studies.measurement import Case, Measurement
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.studies.turns import measure
from pipetrgl.worker import Job
from pipetrgl.world import Place
from tests.equivalence.runs import run, tiny, weights

ROWS, ACTIVATION_BYTES = 8, 8 * 16 * 4  # batch of 8 rows, 16 hidden units of 4 bytes
NEVER: dict[str, Any] = {"valid_every": 0, "at_start": False, "test_at_end": False}
PLAIN: dict[str, Any] = {"batch_norm": False, "dropout": 0.0}


def two_workers(folder: Path, **sections: Any) -> Config:
    """A perceptron without BatchNorm and dropout on two workers."""
    return tiny("mlp", folder, model=PLAIN, pipeline={"stages": 2}, evaluate=NEVER, **sections)


def case(config: Config, contenders: list[str], rounds: int = 1, batches: int = 3) -> Case:
    return Case(config, tuple(contenders), rounds, batches, warm_up=1, micro_batches=(2,))


def workers_of_this_process() -> list[int]:
    text = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    pids = map(int, text.split())
    return [pid for pid in pids if b"turn_taker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    """Two rounds of all contenders, and of one that two stages cannot run: 1F1B with a single micro-batch."""
    names = ["pipetrgl", "stage 0", "stage 1", "independent", "serial", "end_to_end", "end_to_end/threads2", "ddp"]
    config = two_workers(tmp_path_factory.mktemp("runs"))
    return list(measure(case(config, [*names, *SCHEDULES, "1f1b/M1"], rounds=2)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each contender, after two batches."""
    folder = tmp_path_factory.mktemp("weights")
    config = two_workers(folder)
    names = expanded(["pipetrgl", "serial", "end_to_end", "end_to_end/threads2", "ddp", *SCHEDULES], [2, 4])
    note = {"config": dump(config), "spec": describe(config).to_dict(), "contenders": names}
    with Crew("tests.studies.weights_taker", 2, 1) as crew:
        crew.board.post("case", {**note, "folder": str(folder), "batches": 2})
        crew.gather("left", 120)
    return folder


def weights_in(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("stage-*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def test_every_contender_takes_a_turn_in_every_round_in_changing_order(measured: list[Measurement]) -> None:
    turns = [(turn.round, turn.contender) for turn in measured if turn.error is None]
    first, second = ([name for number, name in turns if number == wanted] for wanted in (0, 1))
    assert len(first) == 8 + len(SCHEDULES)
    assert sorted(first) == sorted(second) and first != second
    assert {turn.batches for turn in measured if turn.error is None} == {3}
    assert {turn.rows for turn in measured} == {ROWS}
    assert all(turn.seconds > 0 and turn.images_per_s > 0 for turn in measured if turn.error is None)


def test_a_schedule_that_cannot_run_gives_one_row_that_says_why(measured: list[Measurement]) -> None:
    (failed,) = (turn for turn in measured if turn.error is not None)
    assert failed.contender == "1f1b/M1" and failed.images_per_s == 0 and failed.wait_share == ()
    assert failed.error is not None and failed.error.startswith("ValueError")


def test_bytes_over_the_links_are_those_of_the_measured_batches(measured: list[Measurement]) -> None:
    sent = {turn.contender: turn.sent_bytes for turn in measured}
    assert sent["pipetrgl"] == (3 * ACTIVATION_BYTES, 0)
    for name in ("gpipe/M2", "1f1b/M2"):  # activations one way, as many bytes of gradients the other
        assert sent[name] == (3 * ACTIVATION_BYTES, 3 * ACTIVATION_BYTES)
    # four parts in a loop: 0 > 1 > 0 > 1, so two activations leave worker 0 and one returns, gradients the other way
    assert sent["interleaved_1f1b/M2"] == sent["zero_bubble/M2"] == (9 * ACTIVATION_BYTES,) * 2
    # in a V, 0 > 1 = 1 > 0: one activation and one gradient leave each worker
    assert sent["zero_bubble_v/M2"] == (6 * ACTIVATION_BYTES,) * 2
    for name in ("stage 0", "stage 1", "independent", "serial", "end_to_end"):
        assert sent[name] == (0, 0)


def test_who_takes_no_part_is_told_from_who_does_not_wait(measured: list[Measurement]) -> None:
    waits = {turn.contender: turn.wait_share for turn in measured}
    assert waits["stage 0"] == (0.0, None)
    assert waits["stage 1"] == (None, 0.0)
    assert waits["independent"] == (0.0, 0.0)
    assert waits["serial"] == waits["end_to_end"] == (0.0, None)
    assert waits["ddp"] == (None, None)  # it waits inside of its backward pass
    for name in ("pipetrgl", *(f"{kind}/M2" for kind in SCHEDULES)):
        assert all(share is not None and 0 <= share < 1 for share in waits[name])


def test_spans_of_the_last_round_show_every_batch_of_every_worker(measured: list[Measurement]) -> None:
    assert not any(turn.spans for turn in measured if turn.round == 0)
    last = {turn.contender: turn.spans for turn in measured if turn.round == 1}
    for name in ("pipetrgl", "ddp", "gpipe/M2", "zero_bubble/M2"):
        for worker in (0, 1):
            spans = [span for span in last[name] if span.worker == worker]
            assert all(span.start_s <= span.end_s for span in spans)
            for what in ("forward", "backward", "update"):
                assert {span.batch for span in spans if span.name == what} == {0, 1, 2, 3}
    assert {span.name for span in last["pipetrgl"]} == {"forward", "backward", "update", "send", "wait"}
    assert {span.worker for span in last["serial"]} == {0}


@pytest.mark.parametrize("name", expanded(["end_to_end/threads2", "ddp", *SCHEDULES], [2, 4]))
def test_every_peer_trains_what_end_to_end_does(trained: Path, name: str) -> None:
    mine, theirs = weights_in(trained / name.replace("/", "-")), weights_in(trained / "end_to_end")
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        # the same sums in another order: some units in the last place of float32, twice
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-7, msg=key)


def test_our_pipeline_trains_what_the_serial_loop_does(trained: Path) -> None:
    mine, theirs = weights_in(trained / "pipetrgl"), weights_in(trained / "serial")
    assert mine.keys() == theirs.keys()
    assert all(mine[key].equal(theirs[key]) for key in mine)


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_end_to_end_is_plain_greedy_learning_with_one_stage(tmp_path: Path, model: str) -> None:
    config = tiny(
        model, tmp_path, pipeline={"stages": 1}, evaluate=NEVER, train={"max_steps": 3, "accumulate": 1},
        objective={"transport": {"tau": float("inf")}}, launcher={"name": "serial"},
    )  # fmt: skip
    two_stages = config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"stages": 2})})
    blueprint = draw_up(two_stages, describe(config))
    member = Membership(None, Place(0, 0, 0), torch.device("cpu"), "")
    contender = EndToEnd(Seat(Job(blueprint, tmp_path, {}), member, cast(Board, None)), None)
    contender.train(3, Stopwatch(0))
    mine, theirs = contender.state(), weights(run(config))
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())
    extra = {name for name in theirs.keys() - mine.keys() if not name.startswith(("optimizer.", "metrics."))}
    assert extra == set()


def test_a_worker_that_is_killed_ends_the_measurement_and_leaves_no_process(tmp_path: Path) -> None:
    turns: Iterator[Measurement] = measure(case(two_workers(tmp_path), ["pipetrgl", "gpipe"], rounds=1000))
    next(turns)
    pids = workers_of_this_process()
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(LaunchError, match=rf"worker 1, process {pids[1]}, was killed by SIGKILL"):
        list(turns)
    assert workers_of_this_process() == []


def test_an_error_of_a_worker_is_the_measurements(tmp_path: Path) -> None:
    config = two_workers(tmp_path, optim={"lr": 1e30})
    with pytest.raises(DivergedError, match="stage"):
        list(measure(case(config, ["independent"])))
    assert workers_of_this_process() == []


def test_contenders_that_do_not_exist_are_named_before_any_process_starts(tmp_path: Path) -> None:
    require_known(["stage 1", "end_to_end/threads4", "gpipe/M8"], 2)
    for name in ("stage 2", "gpipe/M0", "gpipe8", "end_to_end/threads0"):
        with pytest.raises(ConfigError, match="there is no"):
            require_known([name], 2)
    with pytest.raises(ConfigError, match="there is no 'dpp'. Did you mean 'ddp'?"):
        next(measure(case(two_workers(tmp_path), ["dpp"])))


def test_the_window_opens_after_the_warm_up() -> None:
    watch = Stopwatch(warm_up=1)
    watch.mark(waited_s=1.0, sent_bytes=10)
    watch.mark(waited_s=2.0, sent_bytes=20)
    watch.mark(waited_s=2.0, sent_bytes=50)
    account = watch.account()
    assert account is not None and account.sent_bytes == 30 and account.wait_share == 0.0
    assert Stopwatch(warm_up=1).account() is None
