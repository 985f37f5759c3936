"""Two local workers against the slower stage alone and against the serial loop, interleaved in one run.

    python benchmarks/two_workers.py [rounds] > benchmarks/two_workers.txt

Every contender trains the same balanced ResNet on the synthetic 3x32x32 task, batch 64, one thread a worker, each in
fresh processes; a round runs all of them one after another, and the ratios are medians over rounds. Rates leave out the
first micro-batch of a run (the pipeline's fill and torch's warm-up).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.contracts import Inbox, NullOutbox
from pipetrgl.config.load import load
from pipetrgl.config.schema import Config
from pipetrgl.engine import loop
from pipetrgl.engine.phases import Parallel
from pipetrgl.launchers.start import describe, environment
from pipetrgl.microbatch import MicroBatch
from pipetrgl.worker import Job, build_hooks, build_loader, build_stage, configure_torch

CONFIG = Path(__file__).with_suffix(".yaml")


class Prepared:
    """An inbox of micro-batches that lie ready in memory: a stage alone never waits."""

    waited_s = 0.0

    def __init__(self, batches: list[MicroBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def close(self) -> None:
        pass


def alone(config: Config, index: int) -> float:
    """Images/s of one stage on what it would receive."""
    configure_torch(config.train)
    blueprint = draw_up(config, describe(config))
    job = Job(blueprint, Path(), {})
    stage = build_stage(blueprint, index, torch.device("cpu"))
    loader = build_loader(job)
    inbox: Inbox = Prepared([_as_received(config, batch, blueprint.input_shape(index)) for batch in loader])
    rows: list[dict[str, object]] = []
    loop.run(stage, inbox, NullOutbox(), Parallel(), build_hooks(job, stage, inbox, NullOutbox(), rows.append))
    (summary,) = [row for row in rows if row["kind"] == "summary"]
    return float(str(summary["images_per_s"]))


def _as_received(config: Config, batch: MicroBatch, shape: tuple[int, ...]) -> MicroBatch:
    """The same rows with an activation of the stage's input shape; its values do not change the time."""
    generator = torch.Generator().manual_seed(batch.index)
    return batch.carrying(torch.randn(batch.num_rows, *shape, generator=generator).relu_())


def rate_of(launcher: str, folder: Path) -> tuple[float, list[float]]:
    """Images/s of a whole run, and the share of time that each stage waited."""
    command = ["-m", "pipetrgl", "train", str(CONFIG), f"launcher.name={launcher}", f"run.folder={folder}"]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    newest = max(folder.iterdir(), key=lambda run: run.stat().st_mtime_ns)
    result = json.loads((newest / "result.json").read_text())
    return result["images_per_s"], [stage["wait_share"] + stage["send_wait_share"] for stage in result["stages"]]


def rate_alone(index: int) -> float:
    done = subprocess.run([sys.executable, __file__, "--alone", str(index)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main(rounds: int) -> None:
    config = load(CONFIG)
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print("round  stage 0 alone  stage 1 alone  serial  two workers   / slower stage  / serial   waited")
    of_slower, of_serial = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, rounds + 1):
            serial, _ = rate_of("serial", Path(folder))
            stages = [rate_alone(index) for index in range(config.pipeline.stages)]
            pipeline, waited = rate_of("local", Path(folder))
            of_slower.append(pipeline / min(stages))
            of_serial.append(pipeline / serial)
            shares = " ".join(f"{100 * share:.0f} %" for share in waited)
            print(
                f"{number:>5}  {stages[0]:>13.1f}  {stages[1]:>13.1f}  {serial:>6.1f}  {pipeline:>11.1f}   "
                f"{of_slower[-1]:>14.3f}  {of_serial[-1]:>8.3f}   {shares}",
                flush=True,
            )
    for name, values in (("the slower stage alone", of_slower), ("serial", of_serial)):
        print(f"two workers / {name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        print(alone(load(CONFIG), int(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
