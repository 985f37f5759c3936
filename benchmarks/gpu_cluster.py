"""What faster devices and other links would make of a plan, by the simulator; nothing of it is measured.

    python benchmarks/gpu_cluster.py > benchmarks/gpu_cluster.txt

The plan is of ResNet-110 on 3x32x32, micro-batches of 64, profiled on one core of the development machine:

    pipetrgl plan CONFIG --workers 16 --max-replicas 1 --repeats 4 --out benchmarks/resnet110_plan.json

Devices of 100 and 300 times that core are assumptions, and that all parts get faster alike: small kernels on a GPU do
not, and profiling there says how much. A device of 300 cores gives one worker 13,000 images/s on this network. The
latency of a link stays what it was here, 0.4 ms over loopback, and so errs on the slow side for NVLink or InfiniBand.
"""

from __future__ import annotations

from pathlib import Path

from pipetrgl.studies.planning import read
from pipetrgl.studies.simulator import simulate
from pipetrgl.studies.what_if import Changes, changed, pipe_of

PLAN = Path(__file__).with_name("resnet110_plan.json")
WORKERS, BATCHES, SPEEDS = (4, 8, 16), (64, 512), (100.0, 300.0)
LINKS_GBPS = (10.0, 25.0, 100.0, 400.0)


def main() -> None:
    plan = read(PLAN)
    print("images/s once full, planned anew for each cell; in brackets the limit (compute, link) and the workers used")
    print("speed  rows  workers" + "".join(f"{gbps:>15.0f} Gbit/s" for gbps in LINKS_GBPS))
    for speed in SPEEDS:
        for batch in BATCHES:
            for workers in WORKERS:
                cells = []
                for gbps in LINKS_GBPS:
                    here = changed(plan, Changes(workers, batch=batch, speed=speed, link_gbps=gbps))
                    rate = batch / simulate(pipe_of(here), 1000).period_s
                    cells.append(f"{rate:>11,.0f} ({here.limit[0]}, {here.num_workers:>2})")
                print(f"{speed:>5.0f}  {batch:>4}  {workers:>7}  " + "    ".join(cells))


if __name__ == "__main__":
    main()
