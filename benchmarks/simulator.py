"""The simulator against measurement: what it predicts for a pipeline, and what emulated workers then take.

    python benchmarks/simulator.py [micro-batches a run] [names ...] > benchmarks/simulator.txt

Every pipeline runs as `pipetrgl train`: real processes, links, loop and hooks, stages that take a time instead of
computing (docs/performance.md). The simulator is given the stages' times, the capacity and the links' times, and
nothing that was measured in the run. A link of this machine is measured beforehand, as `pipetrgl plan` does it; a slow
one has the bytes on the wire over the rate of `tc tbf`: between two network namespaces, half of the stages in each,
under torchrun (needs root). Compared is the time between two micro-batches at the last stage, over the second half of
the stream. The emulated stages and the simulator draw the same jitter.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipetrgl.channels.wire import HEADER_WORDS, label_words  # noqa: E402
from pipetrgl.config.load import dump  # noqa: E402
from pipetrgl.config.schema import Config  # noqa: E402
from pipetrgl.launchers.environment import environment  # noqa: E402
from pipetrgl.studies.costs import LinkSpeed  # noqa: E402
from pipetrgl.studies.link_speed import measure_link  # noqa: E402
from pipetrgl.studies.simulator import Pipe, simulate  # noqa: E402
from tests.hosts import Host, hosts  # noqa: E402

BATCH, WIDTH = 256, 512
PAYLOAD_BYTES = 4 * BATCH * WIDTH
HEADER_BYTES = 8 * (HEADER_WORDS + label_words(BATCH))
ON_THE_WIRE = 1514 / 1448  # an Ethernet frame, as tbf counts it, over the data of TCP in it
EVERY = 5
HANGS_S = 600.0


@dataclass(frozen=True)
class Case:
    """A pipeline; times in milliseconds, a third of them forward.

    Attributes:
        stages: of each stage.
        slow_mbit: of the link in the middle; None for this machine's own.
        extra_ms: that `launcher.faults` lets the second stage sleep before each forward pass.
    """

    name: str
    stages: tuple[float, ...]
    capacity: int = 4
    jitter: float = 0.0
    slow_mbit: int | None = None
    extra_ms: float = 0.0


CASES = (
    Case("2 equal", (40, 40)),
    Case("2 equal, capacity 1", (40, 40), capacity=1),
    Case("2, first slower", (40, 20), capacity=2),
    Case("2, last slower, capacity 1", (20, 40), capacity=1),
    Case("4 equal", (40,) * 4),
    Case("4 equal, capacity 1", (40,) * 4, capacity=1),
    Case("4 unequal", (20, 35, 40, 25), capacity=2),
    Case("4, third 1.5 times", (30, 30, 45, 30)),
    Case("4, second sleeps 20 ms", (30,) * 4, extra_ms=20),
    Case("4, jitter 0.3", (40,) * 4, jitter=0.3),
    Case("4, jitter 0.3, capacity 1", (40,) * 4, capacity=1, jitter=0.3),
    Case("8 equal", (60,) * 8),
    Case("8 unequal", (40, 50, 60, 40, 50, 30, 55, 45), capacity=2),
    Case("2, link of 80 Mbit/s", (40, 40), slow_mbit=80),
    Case("4, link of 160 Mbit/s", (40,) * 4, slow_mbit=160),
    Case("4, link of 160 Mbit/s, capacity 1", (40,) * 4, capacity=1, slow_mbit=160),
)


def config_of(case: Case, folder: Path, num_batches: int) -> Config:
    """An MLP with a block for every stage."""
    sleeps = {"stage": 1, "step": 0, "action": "slow", "seconds": case.extra_ms / 1e3, "num_steps": num_batches}
    content: dict[str, Any] = {
        "data": {"name": "synthetic", "shape": [1, 8, 8], "samples": 8 * BATCH, "valid_fraction": 0.0},
        "model": {"name": "mlp", "depth": len(case.stages), "width": WIDTH, "head": {"name": "pool_linear"}},
        "train": {"batch": BATCH, "epochs": num_batches, "max_steps": num_batches},
        "evaluate": {"valid_every": 0, "test_at_end": False},
        "pipeline": {
            "stages": len(case.stages),
            "device": "emulated",
            "emulated": {
                "forward_s": [ms / 3e3 for ms in case.stages],
                "backward_s": [ms / 1.5e3 for ms in case.stages],
                "jitter": case.jitter,
            },
        },
        "channel": {"capacity": case.capacity},
        "launcher": {"faults": [sleeps] if case.extra_ms else []},
        "metrics": {"every": EVERY},
        "run": {"folder": str(folder / "runs"), "report": False},
    }
    return Config.model_validate(content)


def predicted_s(case: Case, link: LinkSpeed, num_batches: int) -> float:
    """The simulated time between two micro-batches."""
    num_stages = len(case.stages)
    links = [link.time_s(PAYLOAD_BYTES)] * num_stages
    if case.slow_mbit is not None:
        wire_bytes = (PAYLOAD_BYTES + HEADER_BYTES) * ON_THE_WIRE
        links[num_stages // 2 - 1] = link.latency_s + wire_bytes * 8 / (case.slow_mbit * 1e6)
    forward_s = [ms / 3e3 for ms in case.stages]
    forward_s[1] += case.extra_ms / 1e3
    pipe = Pipe(forward_s, [ms / 1.5e3 for ms in case.stages], links, case.capacity)
    return simulate(pipe, num_batches, case.jitter).period_s


def measured_s(case: Case, num_batches: int) -> float:
    """The same of a run: from the last stage's rows of the second half."""
    with tempfile.TemporaryDirectory(prefix="simulator-") as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(dump(config_of(case, folder, num_batches)))
        (run_locally if case.slow_mbit is None else run_on_two_hosts)(case, folder)
        (run,) = (folder / "runs").iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train" and row["stage"] == len(case.stages) - 1]
    return statistics.fmean(BATCH / row["images_per_s"] for row in last if row["step"] > num_batches // 2)


def run_locally(case: Case, folder: Path) -> None:
    command = [sys.executable, "-m", "pipetrgl", "train", "config.yaml"]
    with log_of(folder) as log:
        subprocess.run(command, cwd=folder, env=environ(), stdout=log, stderr=log, check=True, timeout=HANGS_S)


def run_on_two_hosts(case: Case, folder: Path) -> None:
    """Half of the stages on each, under torchrun."""
    with hosts(2) as two, log_of(folder) as log:
        two[1].slow(f"{case.slow_mbit}mbit")
        options = ["--nnodes", "2", "--nproc-per-node", str(len(case.stages) // 2), "--master-addr", two[0].address]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "--master-port", "29400", "--node-rank"]
        agents = [start(host, [*command, str(number)], folder, log) for number, host in enumerate(two)]
        codes = [agent.wait(HANGS_S) for agent in agents]
    if codes != [0, 0]:
        raise RuntimeError((folder / "log").read_text())


def start(host: Host, torchrun: Sequence[str], folder: Path, log: Any) -> subprocess.Popen[str]:
    return host.start(
        [*torchrun, "-m", "pipetrgl", "train", "config.yaml"], cwd=folder, env=environ(), stdout=log, stderr=log
    )


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def log_of(folder: Path) -> Iterator[Any]:
    with (folder / "log").open("w") as log:
        yield log


def main(num_batches: int, names: Sequence[str]) -> None:
    link = measure_link(repeats=5, capacity=4)
    print(
        f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {num_batches} micro-batches of {PAYLOAD_BYTES} bytes"
    )
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    print(f"# a link of this machine: {1e6 * link.latency_s:.0f} us and {link.bytes_per_s / 1e9:.2f} GB/s")
    print("stages                              capacity  predicted ms  measured ms    error")
    errors = []
    for case in CASES:
        if names and case.name not in names:
            continue
        predicted, measured = predicted_s(case, link, num_batches), measured_s(case, num_batches)
        errors.append(abs(predicted / measured - 1))
        print(
            f"{case.name:<34}  {case.capacity:>8}  {1e3 * predicted:>12.2f}  {1e3 * measured:>11.2f}  "
            f"{100 * (predicted / measured - 1):>+6.2f} %",
            flush=True,
        )
    print(f"error of {len(errors)}: median {100 * statistics.median(errors):.2f} %, worst {100 * max(errors):.2f} %")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:])
