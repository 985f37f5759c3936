"""Contenders that take interleaved turns over the same workers: our pipeline, its parts, and its peers.

round 0   pipetrgl ▒▒▒▒   ddp ▒▒▒▒   serial ▒▒▒▒        the speed of a shared machine drifts within tens of seconds,
round 1   serial ▒▒▒▒   pipetrgl ▒▒▒▒   ddp ▒▒▒▒        so every contender gets a turn of a few seconds in each round
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any, final

from pipetrgl.blueprint import draw_up
from pipetrgl.config.load import dump
from pipetrgl.config.schema import Config
from pipetrgl.errors import ConfigError
from pipetrgl.launchers.crew import Crew
from pipetrgl.launchers.start import describe
from pipetrgl.studies.contenders import POLL_S, expanded, require_known
from pipetrgl.studies.measurement import Case, Measurement, Span
from pipetrgl.studies.stopwatch import Account

_MODULE = "pipetrgl.studies.turn_taker"
_ENDLESS = 10**6
_GRACE_S = 0.1


def measure(case: Case) -> Iterator[Measurement]:
    """Every contender's turn of every round, as they are taken; the workers end with the iterator.

    Each contender takes a short turn before the first round, which is not measured. One of torch's that fails in it
    gives a single measurement, with the `error`; any other failure ends the whole.

    Raises:
        ConfigError: the config cannot be run, or there is no such contender.
        PipetrglError: the first failure of any worker; no process is left behind.
    """
    config = _endless(case.config)
    spec = describe(config)
    draw_up(config, spec)
    names = expanded(case.contenders, case.micro_batches)
    require_known(names, config.pipeline.stages)
    with Crew(_MODULE, config.pipeline.stages, config.train.threads) as crew:
        crew.board.post("case", {"config": dump(config), "spec": spec.to_dict(), "contenders": names})
        crew.gather("ready", config.channel.wait_timeout_s)
        leader = _Leader(crew, case)
        running = []
        for name in names:
            if (error := leader.rehearsed(name)) is None:
                running.append(name)
            else:
                yield Measurement(name, 0, config.train.batch, 0, 0.0, (), (), (), (), error=error)
        for number in range(case.rounds):
            for name in random.Random(number).sample(running, len(running)):
                yield leader.measured(name, number)


@final
class _Leader:
    """Says whose turn it is, and puts together what the workers say of it."""

    def __init__(self, crew: Crew, case: Case) -> None:
        self._crew = crew
        self._case = case
        self._turn = 0

    def rehearsed(self, name: str) -> str | None:
        """Take a short turn; why the contender cannot run here, if it cannot."""
        failures = [note["error"] for note in self._take(name, self._case.warm_up + 1, rehearsal=True) if note["error"]]
        # who fails in vain waits of the others comes later
        return str(min(failures, key=lambda failure: failure["at_s"])["message"]) if failures else None

    def measured(self, name: str, number: int) -> Measurement:
        case = self._case
        notes = self._take(name, case.warm_up + case.batches, spans=number == case.rounds - 1)
        accounts = [Account(**note["account"]) if note["account"] else None for note in notes]
        return Measurement(
            contender=name,
            round=number,
            rows=case.config.train.batch,
            batches=case.batches,
            seconds=max(account.seconds for account in accounts if account),
            wait_share=tuple(account.wait_share if account else None for account in accounts),
            cpu_s=tuple(account.cpu_s if account else 0.0 for account in accounts),
            sent_bytes=tuple(account.sent_bytes if account else 0 for account in accounts),
            peak_rss_bytes=tuple(note["peak_rss_bytes"] for note in notes),
            spans=tuple(Span(worker, *span) for worker, note in enumerate(notes) for span in note["spans"]),
        )

    def _take(self, name: str, batches: int, spans: bool = False, rehearsal: bool = False) -> list[dict[str, Any]]:
        """Each worker's answer to one turn."""
        turn, self._turn = self._turn, self._turn + 1
        note = {"contender": name, "batches": batches, "warm_up": self._case.warm_up}
        # by the one clock of this machine; until then every worker has seen the note
        start_s = time.perf_counter() + POLL_S * self._case.config.pipeline.stages + _GRACE_S
        self._crew.board.post(f"turn/{turn}", note | {"spans": spans, "rehearsal": rehearsal, "start_s": start_s})
        return self._crew.gather(f"done/{turn}", self._case.config.channel.wait_timeout_s)


def _endless(config: Config) -> Config:
    """The config of a stream of full training batches that goes on for as long as anybody wants more.

    Raises:
        ConfigError: it trains on a GPU, with replicas, or not in the parallel order.
    """
    if config.pipeline.device == "cuda":
        raise ConfigError("pipeline.device: contenders take turns on the CPU only, and this is cuda")
    if max(config.pipeline.replica_counts) > 1:
        raise ConfigError("pipeline.replicas: contenders take turns with one replica of each stage")
    if config.train.order != "parallel":
        raise ConfigError(f"train.order: contenders take turns in the parallel order, and this is {config.train.order}")
    endless = {"epochs": _ENDLESS, "max_steps": None, "drop_last": True}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=endless),
            "evaluate": config.evaluate.model_copy(update={"valid_every": 0.0, "at_start": False}),
            "launcher": config.launcher.model_copy(update={"faults": []}),
        }
    )
