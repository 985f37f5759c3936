"""One worker of a crew that takes turns: builds its part of every contender, and trains when its turn comes.

python -m pipetrgl.studies.turn_taker RANK PORT          started by `launchers/crew.py`
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch.distributed as dist
from torch.distributed import ProcessGroup

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.alarm import Alarm
from pipetrgl.channels.board import Board
from pipetrgl.channels.c10d import PrefixStore
from pipetrgl.channels.link import LostPeerError
from pipetrgl.config.load import undump
from pipetrgl.data.dataset import DataSpec
from pipetrgl.launchers.crew import serve
from pipetrgl.launchers.membership import Membership
from pipetrgl.memory import peak_rss_bytes
from pipetrgl.studies.contenders import POLL_S, Contender, Seat, is_torchs, num_threads, split_schedule
from pipetrgl.studies.end_to_end import DataParallel, EndToEnd
from pipetrgl.studies.stage_turns import SerialTurns, pipelined, unlinked
from pipetrgl.studies.stopwatch import Stopwatch
from pipetrgl.studies.torch_schedules import TorchSchedule, post_unit_costs
from pipetrgl.worker import Job, configure_torch

_START_S = 60.0
_GROUP_TIMEOUT = timedelta(seconds=60)


def take_turns(member: Membership, board: Board, environ: Mapping[str, str]) -> None:
    """Do what the leader says until it ends this process."""
    note = board.read("case", _START_S, Alarm(), "the leader to say what to measure")
    seat = seat_of(note, member, board, environ)
    contenders = assemble(note["contenders"], seat)
    rank = member.place.rank
    board.post(f"ready/{rank}", {})
    for turn in itertools.count():
        while (note := board.find(f"turn/{turn}")) is None:
            time.sleep(POLL_S * seat.num_workers)  # no deadline: when the leader dies the board says so
        board.post(f"done/{turn}/{rank}", _take(contenders, note))


def seat_of(note: Mapping[str, Any], member: Membership, board: Board, environ: Mapping[str, str]) -> Seat:
    """This worker's, ready to compute, from the leader's note of the case."""
    config = undump(note["config"])
    configure_torch(config.train)
    blueprint = draw_up(config, DataSpec.from_dict(note["spec"]))
    return Seat(Job(blueprint, Path(), dict(environ)), member, board)


def assemble(names: Sequence[str], seat: Seat) -> dict[str, Contender]:
    """This worker's part of each contender, in the same order on all workers, for some connect."""
    groups: dict[str, ProcessGroup] = {}
    torchs = [name for name in names if is_torchs(name)]
    if torchs:
        store = PrefixStore("torch", seat.member.store.clone())
        dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.num_workers)
        # one group each: a schedule that breaks off breaks its own
        groups = {name: dist.new_group(timeout=_GROUP_TIMEOUT) for name in torchs}
    if seat.rank == 0 and any(split_schedule(name) for name in names):
        post_unit_costs(seat)
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = _build(name, seat, groups.get(name))
        except Exception as error:
            if not is_torchs(name):
                raise
            contenders[name] = _Unbuilt(error)
    return contenders


@final
class _Unbuilt:
    """A contender that could not be built."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        raise self._error


@final
class _LooksOn:
    """A worker's part where it has none."""

    def train(self, num_batches: int, watch: Stopwatch) -> None:
        pass


def _build(name: str, seat: Seat, group: ProcessGroup | None) -> Contender:
    if group is not None:
        schedule = split_schedule(name)
        return TorchSchedule(seat, *schedule, group) if schedule else DataParallel(seat, group)
    if name == "pipetrgl":
        return pipelined(seat)
    if name in ("independent", f"stage {seat.rank}"):
        return unlinked(seat)
    if seat.rank > 0 or name.startswith("stage "):
        return _LooksOn()
    return SerialTurns(seat) if name == "serial" else EndToEnd(seat, num_threads(name))


def _take(contenders: dict[str, Contender], note: Mapping[str, Any]) -> dict[str, Any]:
    """One turn, as the leader's note says; the answer to it."""
    name, watch = note["contender"], Stopwatch(note["warm_up"])
    answer: dict[str, Any] = {"account": None, "spans": [], "error": None}
    time.sleep(max(0.0, note["start_s"] - time.perf_counter()))  # all at the same time, not as they happened to look
    try:
        contenders[name].train(note["batches"], watch)
    except Exception as error:
        if not is_torchs(name):
            raise
        if not note["rehearsal"]:  # it has run here before: most likely another worker is lost, who has the first word
            raise LostPeerError(f"{name}: {type(error).__name__}: {error}") from error
        del contenders[name]
        answer["error"] = {"message": f"{type(error).__name__}: {error}", "at_s": time.perf_counter()}
        return answer
    if (account := watch.account()) is not None:
        answer["account"] = dataclasses.asdict(account)
    if note["spans"]:
        answer["spans"] = watch.spans
    return answer | {"peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    serve(take_turns)
