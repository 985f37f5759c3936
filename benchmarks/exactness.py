"""The process launchers at every model, number of stages and capacity against the serial loop, bit for bit.

    python -m benchmarks.exactness [model ...] > benchmarks/exactness.txt

80 runs of 30 steps with evaluations, each a command as a user gives it. The threads launcher has its 40 comparisons in
tests/equivalence/test_equivalence.py, which runs them every time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipetrgl.config.load import dump
from pipetrgl.launchers.environment import environment
from tests.equivalence.runs import MODELS, assert_equal_runs, metrics, run, tiny, weights

ROOT = Path(__file__).resolve().parents[1]
STAGES, CAPACITIES, LAUNCHERS = (1, 2, 4, 8), (1, 8), ("local", "torchrun")


def trained(launcher: str, model: str, stages: int, capacity: int, folder: Path) -> Path:
    """The run folder of one run."""
    folder.mkdir()
    config = tiny(
        model,
        folder / "runs",
        pipeline={"stages": stages},
        channel={"capacity": capacity},
        launcher={"name": "local" if launcher == "torchrun" else launcher},
    )
    if launcher in ("serial", "threads"):
        return run(config)
    (folder / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "pipetrgl", "train", "config.yaml"]
    environ = dict(os.environ)
    if launcher == "torchrun":
        command = [str(ROOT / "launch" / "torchrun.sh"), "config.yaml"]
        environ |= {"NPROC": str(stages), "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"}
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, timeout=300)
    (only,) = (folder / "runs").iterdir()
    return only


def main(models: list[str]) -> None:
    start = time.monotonic()
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print(f"{'model':<14} {'K':>2} {'tensors':>8} {'rows':>5}   differences with capacity 1 and 8, by launcher")
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            for stages in STAGES:
                serial = trained("serial", model, stages, 4, Path(scratch) / f"{model}-{stages}")
                verdicts = []
                for launcher in LAUNCHERS:
                    for capacity in CAPACITIES:
                        folder = Path(scratch) / f"{model}-{stages}-{launcher}-{capacity}"
                        try:
                            assert_equal_runs(trained(launcher, model, stages, capacity, folder), serial)
                            verdicts.append("0")
                        except AssertionError:
                            different += 1
                            verdicts.append("DIFFERENT")
                by_launcher = "   ".join(
                    f"{launcher} {verdicts[2 * place]} {verdicts[2 * place + 1]}"
                    for place, launcher in enumerate(LAUNCHERS)
                )
                counts = f"{len(weights(serial)):>8} {len(metrics(serial)):>5}"
                print(f"{model:<14} {stages:>2} {counts}   {by_launcher}", flush=True)
    total = len(models) * len(STAGES) * len(CAPACITIES) * len(LAUNCHERS)
    print(f"{total} runs, {different} different from serial, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
