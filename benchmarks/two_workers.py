"""Two local workers against the slower stage alone and against the peers, interleaved in one run.

    python -m benchmarks.two_workers [rounds] > benchmarks/two_workers.txt

The balanced ResNet of two_workers.yaml on the synthetic 3x32x32 task, batch 64, one thread a worker;
docs/performance.md says what the contenders are, and how a turn is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from pipetrgl.config.load import load
from pipetrgl.launchers.environment import environment
from pipetrgl.studies.measurement import Case
from pipetrgl.studies.turns import measure

CONFIG = Path(__file__).with_suffix(".yaml")
OURS = ("pipetrgl", "stage 0", "stage 1", "independent", "serial")
PEERS = ("end_to_end", "end_to_end/threads2", "ddp", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")
NUM_BATCHES, WARM_UP, MICRO_BATCHES = 12, 6, (2, 4, 8)


def main(rounds: int) -> None:
    print(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {rounds} rounds, {NUM_BATCHES} batches a turn")
    print(f"# {json.dumps({key: value for key, value in environment().items() if key != 'command'})}")
    rates: dict[str, list[float]] = defaultdict(list)
    for turn in measure(Case(load(CONFIG), (*OURS, *PEERS), rounds, NUM_BATCHES, WARM_UP, MICRO_BATCHES)):
        if turn.error is not None:
            print(f"{turn.contender}: cannot run here: {turn.error}", flush=True)
            continue
        rates[turn.contender].append(turn.images_per_s)
        print(f"round {turn.round + 1:>3}  {turn.contender:<20} {turn.images_per_s:8.1f} images/s", flush=True)
    slower = [min(pair) for pair in zip(rates["stage 0"], rates["stage 1"], strict=True)]
    for name, theirs in {"the slower stage alone": slower, **rates}.items():
        ratios = [mine / other for mine, other in zip(rates["pipetrgl"], theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        print(f"pipetrgl / {name}: median {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
