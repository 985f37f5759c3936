"""What precision and kernel options cost or give: one stage, one thread, one process, every option in turns.

    python -m benchmarks.options [rounds] > benchmarks/options.txt

The middle one of three stages of a ResNet-20 on 3x32x32, micro-batches of 64 in memory: forward, what the outbox makes
of the activation (a dense tensor), backward and update. All contenders take five steps each in a round, and the order
turns with every round. The first two steps, in which the compiled ones are compiled, are left out and timed apart.
Saved MiB: what autograd keeps of one forward pass.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import load
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import MicroBatch
from pipetrgl.stage import Stage
from pipetrgl.studies.footprint import count_at
from pipetrgl.studies.stage_turns import InMemory
from pipetrgl.worker import Job, build_stage, configure_torch

CONFIG = Path(__file__).with_name("two_workers.yaml")

NETWORK = ["model.depth=20", "model.cuts=even", "pipeline.stages=3"]
STAGE = 1
STEPS = 5
"""Steps of a contender in a round."""
CONTENDERS = {
    "as it is": [],
    "fused": ["optim.fused=true"],
    "recompute": ["train.recompute=true"],
    "channels_last": ["train.channels_last=true"],
    "compile": ["train.compile=true"],
    "bf16": ["train.precision=bf16"],
    "bf16, channels_last": ["train.precision=bf16", "train.channels_last=true"],
    "bf16, channels_last, compile": ["train.precision=bf16", "train.channels_last=true", "train.compile=true"],
    "fp16": ["train.precision=fp16"],
}


@dataclass(frozen=True)
class Contender:
    """A stage with its stream, and the seconds of its steps in each round."""

    stage: Stage
    stream: Iterator[MicroBatch]
    warm_up_s: float
    saved_bytes: int
    rounds: list[float] = field(default_factory=list)


def contender(options: list[str]) -> Contender:
    config = load(CONFIG, [*NETWORK, *options])
    configure_torch(config.train)
    blueprint = draw_up(config, describe(config))
    stage = build_stage(blueprint, STAGE, torch.device("cpu"))
    stream = iter(InMemory(Job(blueprint, Path(), {}), STAGE))
    start = time.perf_counter()
    take_step(stage, next(stream))
    take_step(stage, next(stream))
    warm_up_s = time.perf_counter() - start
    saved = count_at(stage, blueprint.input_shape(STAGE), config.train.batch).total
    return Contender(stage, stream, warm_up_s, saved)


def take_step(stage: Stage, micro_batch: MicroBatch) -> None:
    output = stage.forward(micro_batch, True)
    output.activation.detach().contiguous()  # the outbox's
    stage.backward(output, micro_batch)
    stage.update()


def main(rounds: int) -> None:
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds of {STEPS} steps")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}", flush=True)
    contenders = {name: contender(options) for name, options in CONTENDERS.items()}
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            one = contenders[name]
            start = time.perf_counter()
            for _ in range(STEPS):
                take_step(one.stage, next(one.stream))
            one.rounds.append((time.perf_counter() - start) / STEPS)
    plain = contenders["as it is"]
    print(f"{'':28}  ms a step  time / as it is: median (quartiles)  saved MiB  two warm-up steps s  skipped updates")
    for name, one in contenders.items():
        ratios = [mine / theirs for mine, theirs in zip(one.rounds, plain.rounds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        print(
            f"{name:28} {1000 * statistics.median(one.rounds):10.1f}  {statistics.median(ratios):22.3f} "
            f"({low:.3f} to {high:.3f}) {one.saved_bytes / 2**20:10.1f} {one.warm_up_s:20.1f} "
            f"{one.stage.skipped_updates:16}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
