"""Eight to sixty-four emulated workers on this machine: does the engine keep them busy, and what does it cost itself?

    python benchmarks/emulated.py [seconds a run] [workers=milliseconds ...] > benchmarks/emulated.txt

Real workers of the `local` launcher, one process a stage, with the real links, loop, hooks and metrics; only the stages
take a time instead of computing, a third of it for the forward pass (docs/performance.md). Stages of 20 ms at 8
workers, 50 at 16, 100 at 32, 200 at 64, so that two processors carry what the engine itself takes.

rate      of the last stage from its first micro-batch on, when the pipe is full
ideal     one micro-batch every so many milliseconds
engine    processor time of a worker's process, all its threads, for each micro-batch, from its first one to its last
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

BATCH = 64
WIDTH = 256  # 64 KiB in every micro-batch
CASES = {8: 20.0, 16: 50.0, 32: 100.0, 64: 200.0}


def config_of(folder: Path, workers: int, stage_ms: float, num_steps: int) -> Config:
    """An MLP with a block for every worker."""
    content: dict[str, Any] = {
        "data": {"name": "synthetic", "shape": [1, 8, 8], "samples": 64 * BATCH, "valid_fraction": 0.0},
        "model": {"name": "mlp", "depth": workers, "width": WIDTH, "head": {"name": "pool_linear"}},
        "train": {"batch": BATCH, "epochs": num_steps, "max_steps": num_steps},
        "evaluate": {"valid_every": 0, "test_at_end": False},
        "pipeline": {
            "stages": workers,
            "device": "emulated",
            "emulated": {"forward_s": stage_ms / 3e3, "backward_s": stage_ms / 1.5e3},
        },
        # two processors import torch for up to 64 processes
        "channel": {"start_timeout_s": 600.0, "heartbeat_timeout_s": 120.0},
        "run": {"folder": str(folder), "report": False},
    }
    return Config.model_validate(content)


def measure(workers: int, stage_ms: float, seconds: float) -> tuple[float, list[float], int]:
    """Share of the ideal rate, each worker's own milliseconds a micro-batch, and the micro-batches of the run."""
    num_steps = max(20, round(1e3 * seconds / stage_ms))
    with tempfile.TemporaryDirectory(prefix="emulated-") as folder:
        result = train(config_of(Path(folder), workers, stage_ms, num_steps), lambda blueprint, run: lambda row: None)
    assert result is not None
    stages = result["stages"]
    per_s = [stage["images_per_s"] / BATCH for stage in stages]
    own_ms = [1e3 * stage["cpu_s"] / (rate * stage["train_s"]) for stage, rate in zip(stages, per_s, strict=True)]
    return per_s[-1] * stage_ms / 1e3, own_ms, num_steps


def main(seconds: float, cases: dict[int, float]) -> None:
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {os.cpu_count()} processors")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("workers  stage ms  micro-batches  rate / ideal   engine ms: median, most  processors in all")
    for workers, stage_ms in cases.items():
        share, own_ms, num_steps = measure(workers, stage_ms, seconds)
        print(
            f"{workers:>7}  {stage_ms:>8.0f}  {num_steps:>13}  {share:>12.3f}   {statistics.median(own_ms):>17.3f}, "
            f"{max(own_ms):.3f}  {sum(own_ms) / stage_ms * share:>17.2f}",
            flush=True,
        )


if __name__ == "__main__":
    chosen = {int(workers): float(ms) for workers, _, ms in (text.partition("=") for text in sys.argv[2:])}
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, chosen or CASES)
