"""What a benchmark asks for, a case, and what it gets, measurements: values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pipetrgl.config.schema import Config


@final
@dataclass(frozen=True)
class Case:
    """One point of the grid: what all contenders train.

    Attributes:
        config: resolved: `pipeline.stages` equals the number of workers; `model.cuts`, `train.batch`,
            `channel.capacity` and the codec are the case's.
        contenders: their names, see docs/performance.md.
        rounds: interleaved repetitions; the order of the contenders changes from round to round.
        batches: measured in one turn.
        warm_up: first batches of a turn that are left out, the fill of the pipeline.
        micro_batches: numbers of micro-batches tried for torch's schedules; "gpipe" becomes "gpipe/M4".
    """

    config: Config
    contenders: tuple[str, ...]
    rounds: int
    batches: int
    warm_up: int
    micro_batches: tuple[int, ...]


@final
@dataclass(frozen=True)
class Span:
    """What one worker did at one time, on a clock that all workers share.

    Attributes:
        name: "forward", "backward", "update", "send" or "wait".
        start_s, end_s: seconds; only differences mean anything.
        batch: of the turn, from 0, warm-up included.
    """

    worker: int
    name: str
    start_s: float
    end_s: float
    batch: int


@final
@dataclass(frozen=True)
class Measurement:
    """One turn of one contender.

    Attributes:
        contender: its name, with what varies: "gpipe/M4".
        round: from 0.
        rows: images in a batch.
        batches: measured.
        seconds: that the measured batches took by the slowest worker's clock, so batches / seconds is the whole's rate.
        wait_share: of the measured window that each worker waited to receive, or to send; None where the contender
            does not know, such as inside of DDP's backward pass. All tuples have one entry a worker; a worker that
            takes no part has None, or 0.
        cpu_s: processor time of each worker's process in the measured window, helper threads included.
        sent_bytes: payload that each worker sent to others in the measured window.
        peak_rss_bytes: largest resident memory that each worker's process ever had: of all contenders so far.
        spans: of the last round only.
        error: why this contender cannot run here; then there is one row for all rounds, of zeros and empty tuples.
    """

    contender: str
    round: int
    rows: int
    batches: int
    seconds: float
    wait_share: tuple[float | None, ...]
    cpu_s: tuple[float, ...]
    sent_bytes: tuple[int, ...]
    peak_rss_bytes: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    error: str | None = None

    @property
    def images_per_s(self) -> float:
        """Zero where it did not run."""
        return self.rows * self.batches / self.seconds if self.error is None else 0.0
