"""Random strikes against real runs: is the result, whatever happens, the undisturbed one, bit for bit?

    python benchmarks/chaos.py [strikes] [seed] > benchmarks/chaos.txt

Every run is one of the launchers local, torchrun and ray in one of the orders parallel, sequential and multi-lap, with
four stages, a checkpoint every 20 steps, several micro-batch shapes and evaluations, and is struck at random steps:

    one    SIGKILL of one worker                       local, ray: replaced alone; torchrun: all start again
    two    SIGKILL of two neighbours at once           all start again
    all    SIGKILL of every worker                     all start again
    lead   SIGKILL of the supervisor, agent or driver  a new command goes on with `checkpoint.resume=auto`
    stop   SIGTERM to the supervisor, agent or driver  a checkpoint at the next step, an orderly end; then likewise

Weights, buffers, optimizer state and metrics rows are compared with an undisturbed serial run. A run that has not ended
after a quarter of an hour hangs.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.equivalence.runs import assert_equal_runs, run, tiny  # noqa: E402
from tests.equivalence.test_resume import without_logs  # noqa: E402
from tests.failure.pipelines import Pipeline  # noqa: E402

ORDERS: dict[str, dict[str, Any]] = {
    "parallel": {"epochs": 60, "max_steps": 600},
    "sequential": {"order": "sequential", "epochs": 9, "max_steps": None},
    "multi_lap": {"order": "multi_lap", "epochs": 3, "laps": 3, "max_steps": None},
}
STEPS = 576  # that each order takes at least
LAUNCHERS = ("local", "torchrun", "ray")
STRIKES = ("one", "one", "one", "one", "two", "all", "lead", "stop")
DEADLINE_S = 900
STRIKES_PER_RUN = 6


def sections(order: str) -> dict[str, Any]:
    return {
        "pipeline": {"stages": 4},
        "train": ORDERS[order],
        "checkpoint": {"every": 20},
        "optim": {"name": "adamw", "lr": 0.01},
        "metrics": {"every": 1},
    }


class Victim:
    """A run that is struck, and started again where a strike ended it."""

    def __init__(self, folder: Path, launcher: str, order: str) -> None:
        self.folder = folder
        self.launcher = launcher
        self.order = order
        self.deadline = time.monotonic() + DEADLINE_S
        self.pipeline = self.start()

    def start(self) -> Pipeline:
        options = ["launcher.max_failures=99", "checkpoint.resume=auto"]
        command: tuple[str, ...] = ("-m", "pipetrgl")
        if self.launcher == "torchrun":
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "99")
            command = (*torchrun, *command)
        else:
            options.append(f"launcher={self.launcher}")
        return Pipeline(self.folder, *options, command=command, **sections(self.order))

    def step(self) -> int:
        return max((row["step"] for row in self.pipeline.rows()), default=0)

    def wait(self, ready: Any) -> bool:
        """Until `ready()`; False where the run ended before. Raises TimeoutError where it hangs."""
        while not ready():
            if self.pipeline.process.poll() is not None:
                return False
            if time.monotonic() > self.deadline:
                raise TimeoutError
            time.sleep(0.02)
        return True

    def strike(self, kind: str, rng: random.Random) -> str:
        """Strike; returns what was hit."""
        if kind in ("lead", "stop"):
            self.pipeline.process.send_signal(signal.SIGKILL if kind == "lead" else signal.SIGTERM)
            self.pipeline.process.wait(timeout=60)
            while self.pipeline.workers():  # they notice that they are alone
                time.sleep(0.05)
            if not self.is_done():  # it may have ended well just before the strike
                self.pipeline = self.start()
            return kind
        if not self.wait(lambda: len(self.pipeline.workers()) == 4):
            return "nothing"
        workers = self.pipeline.workers()
        first = rng.randrange(4 if kind == "one" else 3)
        hit = {"one": [first], "two": [first, first + 1], "all": list(range(4))}[kind]
        for rank in hit:
            if rank in workers:
                os.kill(workers[rank], signal.SIGKILL)
        return f"{kind} {hit}"

    def is_done(self) -> bool:
        result = self.pipeline.run / "result.json"
        return result.exists() and json.loads(result.read_text())["status"] == "done"

    def finish(self) -> Path:
        """The run folder once the run is done; goes on with it as often as a strike ended it."""
        while True:
            code = self.pipeline.process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
            if self.is_done():
                return self.pipeline.run
            assert code in (0, 1, 130), (code, (self.folder / "stderr").read_text()[-2000:])
            self.pipeline = self.start()


def main(strikes: int, seed: int) -> int:
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    print(f"# {now}, seed {seed}; launcher, order, strikes (at step), result")
    references = {
        order: run(tiny("mlp", folder / order, launcher={"name": "serial"}, **sections(order))) for order in ORDERS
    }
    counts: Counter[str] = Counter()
    for number, (order, launcher) in enumerate(itertools.cycle(itertools.product(ORDERS, LAUNCHERS))):
        if counts["strikes"] >= strikes:
            break
        victim, done, outcome = Victim(folder / str(number), launcher, order), [], "equal"
        try:
            for step in sorted(rng.sample(range(1, STEPS), STRIKES_PER_RUN)):
                kind = rng.choice(STRIKES)
                if not victim.wait(lambda step=step, victim=victim: victim.step() >= step):
                    break
                at = victim.step()
                done.append(f"{victim.strike(kind, rng)} ({at})")
                counts["strikes"] += 1
                counts[kind] += 1
            result = victim.finish()
            assert_equal_runs(without_logs(result), references[order])
            counts["replaced alone"] += len(victim.pipeline.result()["recoveries"])
        except (TimeoutError, subprocess.TimeoutExpired):
            outcome = "HANGS"
        except AssertionError as error:
            outcome = f"DIFFERS {error}"
        finally:
            victim.pipeline.clean_up()
        counts[f"{outcome.split()[0]} runs"] += 1
        print(f"{number:>3} {launcher:<8} {order:<10} {', '.join(done):<70} {outcome}", flush=True)
    print(f"# {dict(counts)}")
    if counts["equal runs"] == number:
        shutil.rmtree(folder)
        return 0
    print(f"# kept: {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 120, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
