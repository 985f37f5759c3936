"""Twenty thousand steps over four workers: does any worker's memory or number of open files grow?

    python benchmarks/soak.py [steps] > benchmarks/soak.txt

A tiny model, evaluations, a checkpoint every 500 steps, and links that keep a replay log. Every two seconds the
resident memory and the open files of the supervisor and of every worker are read from /proc. The slope is a
least-squares line over all samples after the first tenth of the run.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.failure.pipelines import Pipeline  # noqa: E402

PAGE_BYTES = 4096


def sample(pid: int) -> tuple[float, int]:
    """Resident MiB and open files of a process."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20
    return resident, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main(steps: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    pipeline = Pipeline(
        folder / "run",
        "launcher.max_failures=1",
        pipeline={"stages": 4},
        train={"epochs": steps, "max_steps": steps},
        checkpoint={"every": 500},
        metrics={"every": 50},
        evaluate={"valid_every": 10},
    )
    samples: dict[str, list[tuple[int, float, int]]] = {}
    start = time.monotonic()
    while pipeline.process.poll() is None:
        time.sleep(2.0)
        step = max((row["step"] for row in pipeline.rows()), default=0)
        processes = {"supervisor": pipeline.process.pid} | {f"worker {k}": pid for k, pid in pipeline.workers().items()}
        for name, pid in processes.items():
            try:
                samples.setdefault(name, []).append((step, *sample(pid)))
            except OSError:
                continue  # it has ended
    code, errors = pipeline.finish()
    assert code == 0, errors
    print(f"# {steps} steps, 4 workers, {time.monotonic() - start:.0f} s, exit code {code}")
    print("process      samples   MiB first   MiB last   MiB per 1,000 steps   open files first, last, most")
    for name, seen in sorted(samples.items()):
        settled = [one for one in seen if steps / 10 <= one[0] < steps]
        slope = statistics.linear_regression([one[0] for one in settled], [one[1] for one in settled]).slope * 1000
        files = [one[2] for one in settled]
        print(
            f"{name:<12} {len(settled):>7} {settled[0][1]:>11.1f} {settled[-1][1]:>10.1f} {slope:>21.3f}   "
            f"{files[0]}, {files[-1]}, {max(files)}"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
