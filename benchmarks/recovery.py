"""A killed worker: what does replacing its stage alone cost, and what does starting the whole run again cost?

    python benchmarks/recovery.py [rounds] > benchmarks/recovery.txt

The quickstart's network in four local workers on 28x28 images, 400 steps of 32, a checkpoint every 50. In each round,
by turns: undisturbed; one stage killed at a step past 170, replaced alone; the same with `launcher.restart=run`. The
stage changes from round to round. Seconds lost are the difference to the round's undisturbed run in wall time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipetrgl.launchers.environment import environment  # noqa: E402
from tests.failure.pipelines import Pipeline  # noqa: E402

SECTIONS: dict[str, Any] = {
    "data": {"shape": [1, 28, 28], "samples": 4000, "num_classes": 10},
    "pipeline": {"stages": 4},
    "train": {"epochs": 10, "max_steps": 400, "batch": 32},
    "evaluate": {"valid_every": 0, "at_start": False, "test_at_end": False},
    "checkpoint": {"every": 50},
    "metrics": {"every": 1},
}
NETWORK = ("model.depth=20", "model.width=16", "model.cuts=[2,2,2,3]")
STRIKE_AT = 170


def race(folder: Path, stage: int | None, *overrides: str) -> dict[str, Any]:
    pipeline = Pipeline(folder, "launcher.max_failures=1", *NETWORK, *overrides, model="resnet", **SECTIONS)
    if stage is not None:
        pipeline.wait_for_step(STRIKE_AT, stage)
        pipeline.kill(stage)
    code, errors = pipeline.finish()
    assert code == 0, errors
    return pipeline.result()


def main(rounds: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("round  stage   undisturbed s   alone: lost s  linked s  caught up s  steps again   whole run: lost s")
    lost: dict[str, list[float]] = {"alone": [], "run": []}
    linked = []
    for number in range(rounds):
        stage = number % 4
        plain = race(folder / f"{number}-plain", None)["wall_s"]
        alone = race(folder / f"{number}-alone", stage)
        whole = race(folder / f"{number}-run", stage, "launcher.restart=run")
        (recovery,) = alone["recoveries"]
        lost["alone"].append(alone["wall_s"] - plain)
        lost["run"].append(whole["wall_s"] - plain)
        linked.append(recovery["linked_s"])
        print(
            f"{number + 1:>5} {stage:>6} {plain:>15.1f} {lost['alone'][-1]:>15.1f} {recovery['linked_s']:>9.1f} "
            f"{recovery['caught_up_s']:>12.1f} {recovery['step'] - recovery['from_step']:>12} {lost['run'][-1]:>19.1f}",
            flush=True,
        )
    print(
        f"medians: replaced alone {statistics.median(lost['alone']):.1f} s lost, links open again after "
        f"{statistics.median(linked):.1f} s; whole run {statistics.median(lost['run']):.1f} s lost"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
