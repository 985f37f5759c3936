"""Replicas 1-2-1 over four emulated workers: does a second worker for the heavy middle stage double the rate?

    python benchmarks/replicas.py [micro-batches a run] [rounds] > benchmarks/replicas.txt

Stages of 50, 100 and 50 ms on emulated devices, under the `local` launcher: real processes, links, loop and hooks; rows
are split and joined, and the middle stage's replicas add up gradients of its real size after each backward pass. Ideal
is one micro-batch every 50 ms with two replicas, every 100 ms with one. Rates are the last stage's, from its first
micro-batch on, when the pipe is full. Rounds take the two in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipetrgl.config.schema import Config
from pipetrgl.launchers.environment import environment
from pipetrgl.launchers.start import train

BATCH, WIDTH = 64, 256
STAGE_S = [0.05, 0.1, 0.05]
IDEAL_S = {(1, 1, 1): 0.1, (1, 2, 1): 0.05}


def config_of(folder: Path, replicas: tuple[int, ...], num_steps: int) -> Config:
    """An MLP of six blocks in three stages, 0.26 million parameters each."""
    content: dict[str, Any] = {
        "data": {"name": "synthetic", "shape": [1, 8, 8], "samples": 64 * BATCH, "valid_fraction": 0.0},
        "model": {"name": "mlp", "depth": 6, "width": WIDTH, "head": {"name": "pool_linear"}},
        "train": {"batch": BATCH, "epochs": num_steps, "max_steps": num_steps},
        "evaluate": {"valid_every": 0, "test_at_end": False},
        "pipeline": {
            "stages": 3,
            "replicas": list(replicas),
            "device": "emulated",
            "emulated": {"forward_s": [s / 3 for s in STAGE_S], "backward_s": [s / 1.5 for s in STAGE_S]},
        },
        "run": {"folder": str(folder), "report": False},
    }
    return Config.model_validate(content)


def share_of_ideal(replicas: tuple[int, ...], num_steps: int) -> float:
    """The measured rate over the ideal one."""
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
        result = train(config_of(Path(folder), replicas, num_steps), lambda blueprint, run: lambda row: None)
    assert result is not None
    per_s: float = result["stages"][-1]["images_per_s"] / BATCH
    return per_s * IDEAL_S[replicas]


def main(num_steps: int, rounds: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    print(
        f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {num_steps} micro-batches a run, stages {STAGE_S} s"
    )
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}", flush=True)
    shares: dict[tuple[int, ...], list[float]] = {replicas: [] for replicas in IDEAL_S}
    for number in range(rounds):
        for replicas in IDEAL_S:
            shares[replicas].append(share_of_ideal(replicas, num_steps))
            print(f"round {number + 1}  replicas {replicas}: {shares[replicas][-1]:.3f} of the ideal", flush=True)
    for replicas, values in shares.items():
        print(f"replicas {replicas}: median {statistics.median(values):.3f} of the ideal rate")
    gain = [2 * two / one for one, two in zip(shares[1, 1, 1], shares[1, 2, 1], strict=True)]
    print(f"two replicas over one: median {statistics.median(gain):.3f} times the rate")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]) if len(sys.argv) == 3 else (200, 5))
