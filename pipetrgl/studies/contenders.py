"""Who takes turns: the names of all contenders, and the contract of what is behind them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from pipetrgl.blueprint import Blueprint
from pipetrgl.channels.board import Board
from pipetrgl.errors import ConfigError, nearest
from pipetrgl.launchers.membership import Membership
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.worker import Job

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zero_bubble_v")
"""Of torch.distributed.pipelining; each with a number of micro-batches, "gpipe/M4"."""

POLL_S = 0.02
"""Between two looks of a worker for its next turn, times the workers: all together ask no more often than one would."""


class Contender(Protocol):
    """One worker's part in a way to train the case's network."""

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        """Go on training for so many batches; marks the beginning, and the end of each batch."""


@final
@dataclass(frozen=True)
class Seat:
    """One worker of the crew, from which contenders are built.

    Attributes:
        job: of the case's config.
        member: of the crew.
        board: of the crew.
    """

    job: Job
    member: Membership
    board: Board

    @property
    def rank(self) -> int:
        return self.member.place.rank

    @property
    def blueprint(self) -> Blueprint:
        return self.job.blueprint

    @property
    def num_workers(self) -> int:
        return self.blueprint.num_stages


def expanded(contenders: Sequence[str], micro_batches: Sequence[int]) -> list[str]:
    """The names with each number of micro-batches where it is not said.

    >>> expanded(["serial", "gpipe"], [2, 4])
    ["serial", "gpipe/M2", "gpipe/M4"]
    """
    names = []
    for name in contenders:
        names += [f"{name}/M{count}" for count in micro_batches] if name in SCHEDULES else [name]
    return names


def split_schedule(name: str) -> tuple[str, int] | None:
    """("gpipe", 4) of "gpipe/M4"; None if it is no schedule of torch's."""
    match = re.fullmatch(r"(\w+)/M([1-9]\d*)", name)
    return (match[1], int(match[2])) if match and match[1] in SCHEDULES else None


def is_torchs(name: str) -> bool:
    """Whether it needs torch's default process group, and may fail alone."""
    return name == "ddp" or split_schedule(name) is not None


def num_threads(name: str) -> int | None:
    """2 of "end_to_end/threads2", None of any other name."""
    match = re.fullmatch(r"end_to_end/threads([1-9]\d*)", name)
    return int(match[1]) if match else None


def require_known(names: Sequence[str], num_workers: int) -> None:
    """Raises:
    ConfigError: some are no contenders.
    """
    stages = [f"stage {index}" for index in range(num_workers)]
    known = ["pipetrgl", "independent", "serial", "end_to_end", "ddp", *stages]
    for name in names:
        if not (name in known or is_torchs(name) or num_threads(name)):
            examples = [*known, "end_to_end/threads2", *(f"{schedule}/M4" for schedule in SCHEDULES)]
            raise ConfigError(f"contenders: there is no {name!r}. {nearest(name, examples)}")
