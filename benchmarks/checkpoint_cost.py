"""What a checkpoint every 20 steps costs: the workers of two_workers.yaml, with and without, interleaved in one run.

    python -m benchmarks.checkpoint_cost [rounds] > benchmarks/checkpoint_cost.txt

Each turn trains 42 micro-batches and leaves out the first two; a saving turn holds two checkpoints of both stages with
their optimizer state, snapshot and background write (with fsync) included. The order of the two changes every round.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.config.load import load
from pipetrgl.engine import loop
from pipetrgl.engine.phases import Parallel
from pipetrgl.launchers.crew import Crew, serve
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.membership import Membership
from pipetrgl.launchers.start import describe
from pipetrgl.launchers.store_links import StoreLinks
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import StageOutput
from pipetrgl.studies.stage_turns import Portions, StaysOpen
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, build_trainee, configure_torch

CONFIG = Path(__file__).with_name("two_workers.yaml")

NUM_BATCHES = 42
FILL = 2
EVERY = 20


class Clock:
    """A hook that notes when each micro-batch is done with."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        self.times.append(time.perf_counter())

    def close(self) -> None:
        pass


def drop(row: dict[str, Any]) -> None:
    """Metrics are computed as in a real run, and not kept."""


def work(member: Membership, board: Board, environ: Mapping[str, str]) -> None:
    """One of the two workers: saves in the turns called "saving"."""
    config = load(CONFIG, [f"checkpoint.every={EVERY}"])
    configure_torch(config.train)
    folder = Path(board.read("folder", 60, Alarm(), "the leader"))
    job, rank = Job(draw_up(config, describe(config)), folder, dict(environ)), member.place.rank
    stage = build_stage(job.blueprint, rank, torch.device("cpu"))
    links = StoreLinks(job, member, board, Alarm())
    inbox = Portions(build_loader(job) if rank == 0 else links.inbox(member.place))
    inbox.num_batches = NUM_BATCHES
    outbox = StaysOpen(links.outbox(member.place))
    for turn in itertools.count():
        kind = board.read(f"turn/{turn}", 600, Alarm(), "the leader")
        hooks, clock = build_hooks(job, stage, inbox, outbox, drop), Clock()  # the last of them saves
        hooks = [*(hooks if kind == "saving" else hooks[:-1]), clock]
        loop.run(build_trainee(job, stage), inbox, outbox, Parallel(), hooks)
        board.post(f"done/{turn}/{rank}", (NUM_BATCHES - 1 - FILL) / (clock.times[-1] - clock.times[FILL]))


def main(rounds: int) -> None:
    batch = load(CONFIG).train.batch
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds, {NUM_BATCHES} steps a turn")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("images/s of the slower worker\nround    plain   saving | saving/plain")
    turns, ratios = itertools.count(), []
    with tempfile.TemporaryDirectory() as folder, Crew("benchmarks.checkpoint_cost", 2, 1) as crew:
        crew.board.post("folder", folder)
        for number in range(-1, rounds):
            got = {}
            for contender in ("plain", "saving") if number % 2 else ("saving", "plain"):
                turn = next(turns)
                crew.board.post(f"turn/{turn}", contender)
                got[contender] = batch * min(crew.gather(f"done/{turn}", 600))
            if number < 0:
                continue  # warm-up
            ratios.append(got["saving"] / got["plain"])
            print(f"{number + 1:>5} {got['plain']:8.1f} {got['saving']:8.1f} | {ratios[-1]:12.3f}", flush=True)
        sizes = [file.stat().st_size for file in Path(folder).glob("checkpoints/step-*/*.safetensors")]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"saving / plain: median {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})")
    print(f"{len(sizes)} files written, {statistics.mean(sizes) / 2**20:.1f} MiB each")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # rank and port: started by the crew
        serve(work)
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
