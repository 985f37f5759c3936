"""What `train.keep_memory` gives: one stage, one thread, with and without it, in turns.

    python -m benchmarks.allocator [rounds] > benchmarks/allocator.txt

Stage 0 of benchmarks/two_workers.yaml alone on micro-batches in memory; a fresh process each time.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import load
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.start import describe
from pipetrgl.memory import peak_rss_bytes
from pipetrgl.studies.stage_turns import InMemory
from pipetrgl.worker import Job, build_stage, configure_torch

CONFIG = Path(__file__).with_name("two_workers.yaml")

NUM_STEPS = 15


def one(keep: str) -> None:
    """Print images/s, page faults a step and peak MiB of this process."""
    config = load(CONFIG, [f"train.keep_memory={keep}"])
    configure_torch(config.train)
    blueprint = draw_up(config, describe(config))
    stage, stream = build_stage(blueprint, 0, torch.device("cpu")), iter(InMemory(Job(blueprint, Path(), {}), 0))
    for step in range(3 + NUM_STEPS):
        if step == 3:
            start, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        batch = next(stream)
        output = stage.forward(batch, True)
        stage.backward(output, batch)
        stage.update()
        del output
    rate = NUM_STEPS * config.train.batch / (time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(json.dumps([rate, faults / NUM_STEPS, peak_rss_bytes() / 2**20]))


def main(rounds: int) -> None:
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("round   images/s without  with   ratio | faults a step without  with | peak MiB without  with")
    ratios = []
    for number in range(1, rounds + 1):
        got = {}
        for keep in ("false", "true") if number % 2 else ("true", "false"):
            command = [sys.executable, "-m", "benchmarks.allocator", "--one", keep]
            got[keep] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        (a, b, c), (d, e, f) = got["false"], got["true"]
        ratios.append(d / a)
        print(f"{number:>5} {a:18.1f} {d:5.1f} {d / a:7.3f} | {b:21.0f} {e:5.0f} | {c:16.0f} {f:5.0f}", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"with / without: median {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
