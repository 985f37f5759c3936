"""Two local workers against the slower stage alone and against the serial loop, interleaved in one run.

    python benchmarks/two_workers.py [rounds] > benchmarks/two_workers.txt

A balanced ResNet on the synthetic 3x32x32 task, batch 64, one thread a worker. Two worker processes live through the
whole benchmark, each with its stage, the real link between them and the real loop and hooks; the machine's speed drifts
within tens of seconds, so each round gives every contender a turn of a few seconds, in changing order:

    pipeline   both workers, stage 0 reading from the data loader, stage 1 from the link
    stage 0    worker 0 alone, on micro-batches that lie in memory
    stage 1    worker 1 alone, likewise
    both       both workers at once without a link: what this machine gives two independent processes
    serial     worker 0 alone runs both stages, the plain loop

A turn trains a number of micro-batches; its rate leaves out the first two, the fill of the pipeline.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.channels.contracts import Inbox, NullOutbox, Outbox
from pipetrgl.config.load import load
from pipetrgl.engine import loop
from pipetrgl.engine.phases import Parallel
from pipetrgl.engine.saving import SaveCheckpoints
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.membership import Membership
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.store_links import StoreLinks
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage, StageOutput
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, build_trainee, configure_torch

CONFIG = Path(__file__).with_suffix(".yaml")
NUM_BATCHES = 14
FILL = 2
CONTENDERS = ("pipeline", "stage 0", "stage 1", "both", "serial")


class Turn:
    """An inbox that gives the next micro-batches of an endless stream and leaves the stream open."""

    waited_s = 0.0

    def __init__(self, stream: Iterator[MicroBatch], count: int = NUM_BATCHES) -> None:
        self._stream = stream
        self._count = count

    def __iter__(self) -> Iterator[MicroBatch]:
        for _ in range(self._count):
            yield next(self._stream)

    def close(self) -> None:
        pass


class StaysOpen:
    """An outbox that outlives a turn."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    @property
    def waited_s(self) -> float:
        return self._outbox.waited_s

    @property
    def sent_bytes(self) -> int:
        return self._outbox.sent_bytes

    @property
    def received_index(self) -> int:
        return self._outbox.received_index

    def send(self, micro_batch: MicroBatch) -> None:
        self._outbox.send(micro_batch)

    def close(self) -> None:
        pass


class Stopwatch:
    """A hook that notes when each micro-batch is done with."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self.times.append(time.perf_counter())

    def close(self) -> None:
        pass


def drop(row: dict[str, Any]) -> None:
    """Metrics are computed as in a real run, and not kept."""


class Worker:
    """One of the two processes; obeys the notes of the leader."""

    def __init__(self, rank: int, port: int) -> None:
        config = load(CONFIG)
        configure_torch(config.train)
        self.rank = rank
        self.blueprint: Blueprint = draw_up(config, describe(config))
        self.job = Job(self.blueprint, Path(), {})
        self.board = Board(TCPStore("127.0.0.1", port, is_master=False), config.channel.heartbeat_timeout_s)
        cpu = torch.device("cpu")
        place = self.blueprint.world.place(rank)
        links = StoreLinks(self.job, Membership(self.board.store, place, cpu, "127.0.0.1"), self.board, Alarm())
        self.stages = [build_stage(self.blueprint, index, cpu) for index in range(2)]
        self.prepared = [prepared(self.blueprint, index) for index in range(2)]
        self.stream: Iterator[MicroBatch] = iter(build_loader(self.job) if rank == 0 else links.inbox(1))
        self.outbox: Outbox = StaysOpen(links.outbox(0)) if rank == 0 else NullOutbox()

    def obey(self) -> None:
        """Take every turn until the leader says stop."""
        for turn in range(10**9):
            note = self.board.read(f"turn/{turn}", 3600, Alarm(), "the leader")
            if note["contender"] == "stop":
                # without the links' and the loader's orderly end: their streams go on for ever
                os._exit(0)
            times = self.take(note["contender"])
            self.board.post(f"done/{turn}/{self.rank}", times)

    def take(self, contender: str) -> list[float]:
        mine = f"stage {self.rank}"
        if contender == "pipeline":
            return self._train(self.stages[self.rank], Turn(self.stream), self.outbox)
        if contender in (mine, "both"):
            return self._train(self.stages[self.rank], Turn(self.prepared[self.rank]), NullOutbox())
        if contender == "serial" and self.rank == 0:
            return self._train_serially()
        return []

    def _train(self, stage: Stage, inbox: Inbox, outbox: Outbox) -> list[float]:
        watch = Stopwatch()
        hooks = [*self._hooks(stage, inbox, outbox), watch]
        loop.run(build_trainee(self.job, stage), inbox, outbox, Parallel(), hooks)
        return watch.times

    def _hooks(self, stage: Stage, inbox: Inbox, outbox: Outbox) -> list[loop.Hook]:
        """Those of a real run, but the saving one: the end of a turn is not the end of the stream."""
        hooks = build_hooks(self.job, stage, inbox, outbox, drop)
        return [hook for hook in hooks if not isinstance(hook, SaveCheckpoints)]

    def _train_serially(self) -> list[float]:
        inbox, watch = Turn(self.prepared[0]), Stopwatch()
        hooks = [self._hooks(stage, inbox, NullOutbox()) for stage in self.stages]
        trainees = [build_trainee(self.job, stage) for stage in self.stages]
        for micro_batch in inbox:
            for stage, watchers in zip(trainees, hooks, strict=True):
                output = stage.forward(micro_batch, True)
                stage.backward(output, micro_batch)
                stage.update()
                for hook in watchers:
                    hook(micro_batch, output)
                micro_batch = micro_batch.carrying(output.activation.detach())
            watch(micro_batch, output)
        return watch.times


def prepared(blueprint: Blueprint, index: int) -> Iterator[MicroBatch]:
    """Training micro-batches with activations of the stage's input shape; their values do not change the time."""
    generator = torch.Generator().manual_seed(index)
    shape = (blueprint.config.train.batch, *blueprint.input_shape(index))
    with build_loader(Job(blueprint, Path(), {})) as batches:
        few = [next(batches).carrying(torch.randn(shape, generator=generator).relu_()) for _ in range(4)]
    while True:
        yield from few


def rate(times: list[float], batch: int) -> float:
    return batch * (len(times) - 1 - FILL) / (times[-1] - times[FILL])


def main(rounds: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = Board(store, 30.0)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(rank), str(store.port)], env=environ)
        for rank in range(2)
    ]
    try:
        _lead(board, rounds)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()


def _lead(board: Board, rounds: int) -> None:
    batch = load(CONFIG).train.batch
    turn = -1

    def race(contender: str) -> tuple[float, ...]:
        nonlocal turn
        turn += 1
        board.post(f"turn/{turn}", {"contender": contender})
        times = [board.read(f"done/{turn}/{rank}", 600, Alarm(), "a worker") for rank in range(2)]
        return tuple(rate(one, batch) for one in times if one)

    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds, {NUM_BATCHES} steps a turn")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    for contender in CONTENDERS:
        race(contender)  # warm-up, not counted
    print("images/s; both: of stage 0 and of stage 1 while the other runs as well, without a link")
    print("round   pipeline  stage 0  stage 1   both         serial | pipeline/slower  pipeline/serial")
    rows = []
    for number in range(rounds):
        shift = number % len(CONTENDERS)
        got = {contender: race(contender) for contender in CONTENDERS[shift:] + CONTENDERS[:shift]}
        pipeline, slower = min(got["pipeline"]), min(got["stage 0"][0], got["stage 1"][0])
        rows.append({"slower": pipeline / slower, "serial": pipeline / got["serial"][0]})
        rows[-1]["together"] = pipeline / min(got["both"])
        rows[-1]["ceiling"] = min(got["both"]) / slower
        print(
            f"{number + 1:>5}   {pipeline:8.1f} {got['stage 0'][0]:8.1f} {got['stage 1'][0]:8.1f}   "
            f"{got['both'][0]:5.1f} {got['both'][1]:5.1f} {got['serial'][0]:8.1f} | "
            f"{rows[-1]['slower']:15.3f}  {rows[-1]['serial']:15.3f}",
            flush=True,
        )
    board.post(f"turn/{turn + 1}", {"contender": "stop"})
    _summary("two workers / the slower stage alone", [row["slower"] for row in rows])
    _summary("two workers / serial", [row["serial"] for row in rows])
    _summary(
        "two workers / the slower of both stages running at once without a link", [row["together"] for row in rows]
    )
    _summary("this machine: that slower one / the slower stage alone", [row["ceiling"] for row in rows])


def _summary(name: str, values: list[float]) -> None:
    low, _, high = statistics.quantiles(values, n=4)
    print(f"{name}: median {statistics.median(values):.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Worker(int(sys.argv[2]), int(sys.argv[3])).obey()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
