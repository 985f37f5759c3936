"""What a checkpoint every 20 steps costs: the two workers of two_workers.py, with and without, interleaved in one run.

    python benchmarks/checkpoint_cost.py [rounds] > benchmarks/checkpoint_cost.txt

Each turn trains 42 micro-batches and leaves out the first two; a saving turn holds two checkpoints of both stages with
their optimizer state, snapshot and background write (with fsync) included. The order of the two changes every round.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import two_workers
from two_workers import Turn, Worker, drop, rate

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import TCPStore
from pipetrgl.channels.contracts import Inbox, Outbox
from pipetrgl.config.load import load
from pipetrgl.engine import loop
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.start import describe
from pipetrgl.stage import Stage
from pipetrgl.worker import Job, build_hooks

NUM_BATCHES = 42
EVERY = 20


class SavingWorker(Worker):
    """A worker that saves in the turns called "saving"."""

    def __init__(self, rank: int, port: int, folder: Path) -> None:
        super().__init__(rank, port)
        config = load(two_workers.CONFIG, [f"checkpoint.every={EVERY}"])
        self.job = Job(draw_up(config, describe(config)), folder, {})
        self.saves = False

    def take(self, contender: str) -> list[float]:
        self.saves = contender == "saving"
        return self._train(self.stages[self.rank], Turn(self.stream, NUM_BATCHES), self.outbox)

    def _hooks(self, stage: Stage, inbox: Inbox, outbox: Outbox) -> list[loop.Hook]:
        hooks = super()._hooks(stage, inbox, outbox)
        return [*hooks, *build_hooks(self.job, stage, inbox, outbox, drop)[-1:]] if self.saves else hooks


def main(rounds: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board, folder = Board(store, 30.0), Path(tempfile.mkdtemp(prefix="checkpoint-cost-"))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(rank), str(store.port), str(folder)], env=environ)
        for rank in range(2)
    ]
    try:
        _lead(board, folder, rounds)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
        shutil.rmtree(folder)


def _lead(board: Board, folder: Path, rounds: int) -> None:
    batch = load(two_workers.CONFIG).train.batch
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds, {NUM_BATCHES} steps a turn")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("images/s of the slower worker\nround    plain   saving | saving/plain")
    turn, ratios = 0, []
    for number in range(-1, rounds):
        got = {}
        for contender in ("plain", "saving") if number % 2 else ("saving", "plain"):
            board.post(f"turn/{turn}", {"contender": contender})
            times = [board.read(f"done/{turn}/{rank}", 600, Alarm(), "a worker") for rank in range(2)]
            got[contender] = min(rate(one, batch) for one in times)
            turn += 1
        if number < 0:
            continue  # warm-up
        ratios.append(got["saving"] / got["plain"])
        print(f"{number + 1:>5} {got['plain']:8.1f} {got['saving']:8.1f} | {ratios[-1]:12.3f}", flush=True)
    board.post(f"turn/{turn}", {"contender": "stop"})
    low, _, high = statistics.quantiles(ratios, n=4)
    files = list(folder.glob("checkpoints/step-*/*.safetensors"))
    print(f"saving / plain: median {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})")
    print(f"{len(files)} files written, {statistics.mean(file.stat().st_size for file in files) / 2**20:.1f} MiB each")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        SavingWorker(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])).obey()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
