"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, final

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipetrgl.blueprint import Blueprint
from pipetrgl.engine.metrics import Row
from pipetrgl.studies.tables import TABLE_HEADER, table_rows
from pipetrgl.studies.wording import number, percent, rate

_LIVE_HEADER = ["stage", "loss", "task", "transport", "head", "valid", "images/s", "waited"]
# the report's columns in words that fit 80 characters; `validate` and the report name the blocks
_RESULT_HEADER = {
    "stage": "stage", "valid accuracy": "valid", "test accuracy": "test", "local loss": "loss",
    "transport cost": "transport", "images/s": "images/s", "waited": "waited", "head": "head",
}  # fmt: skip


@final
class Progress:
    """Sees every row of every stage; shows them together once all stages at work have reached the same step.

    Use as a context manager: leaving it takes the live table down.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._blueprint: Blueprint | None = None
        self._latest: list[dict[str, Row]] = []
        self._at_step: dict[tuple[str, int], dict[int, Row]] = {}

    def open(self, blueprint: Blueprint, run: Path) -> Self:
        """Say what is about to run."""
        self._blueprint = blueprint
        self._latest = [{} for _ in range(blueprint.num_stages)]
        itinerary, spec = blueprint.itinerary, blueprint.spec
        self._console.print(
            f"{blueprint.network.name} in {blueprint.num_stages} stages on {spec.name}: "
            f"{spec.num_train:,} {spec.samples}, {itinerary.total_steps} steps of {blueprint.config.train.batch}",
            highlight=False,
        )
        self._console.print(f"run folder: {run}", highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __call__(self, row: Row) -> None:
        kind = row["kind"]
        if kind == "log":
            self._console.print(f"{row['level'].lower()}: {row['message']}", highlight=False, soft_wrap=True)
        if kind not in ("train", "valid", "test"):
            return
        self._latest[row["stage"]][kind] = row
        if self._live is not None:
            self._live.update(self._table())
            return
        rows = self._at_step.setdefault((kind, row["step"]), {})
        rows[row["stage"]] = row
        assert self._blueprint is not None
        phase = self._blueprint.itinerary.sweep.phase_after(row["step"])
        if len(rows) == len(phase.learners if kind == "train" else phase.reached):
            del self._at_step[kind, row["step"]]
            self._console.print(self._line(kind, [rows[k] for k in sorted(rows)]), highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self, kind: str, rows: list[Row]) -> str:
        """`step 80/680 epoch 1/8 | local 1.83 1.80 | head acc 45.1 46.0 % | 523 img/s | waited 3 4 %`, by stage.

        Where one stage learns at a time, its number follows the epoch: `step 80/680 epoch 1/8 stage 0 | ...`.
        """
        assert self._blueprint is not None
        total, epochs = self._blueprint.itinerary.total_steps, self._blueprint.itinerary.sweep.num_epochs
        learner = f" stage {rows[0]['stage']}" if self._blueprint.config.train.one_by_one else ""
        accuracy = " ".join("-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}" for row in rows)
        if kind != "train":
            return f"{kind:<5} after step {rows[0]['step']}/{total} | head acc {accuracy} %"
        rates = [row["images_per_s"] for row in rows if row["images_per_s"] is not None]
        waits = " ".join("-" if row["wait_share"] is None else f"{100 * row['wait_share']:.0f}" for row in rows)
        losses = " ".join("-" if row["local_loss"] is None else f"{row['local_loss']:.3f}" for row in rows)
        return (
            f"step {rows[0]['step']}/{total} epoch {rows[0]['epoch'] + 1}/{epochs}{learner} | local {losses} | "
            f"head acc {accuracy} % | {rate(min(rates, default=None))} img/s | waited {waits} %"
        )

    def _table(self) -> Table:
        assert self._blueprint is not None
        steps = [rows.get("train", {}).get("step", 0) for rows in self._latest]
        reached = (max if self._blueprint.config.train.one_by_one else min)(steps)
        total = self._blueprint.itinerary.total_steps
        table = Table(
            title=f"step {reached} of {total}", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True
        )
        for column in _LIVE_HEADER:
            table.add_column(column, justify="right", no_wrap=True)
        for stage, rows in enumerate(self._latest):
            train, valid = rows.get("train", {}), rows.get("valid", {})
            cells = [str(stage), *(number(train.get(key)) for key in ("local_loss", "task_loss", "transport_cost"))]
            cells += [percent(train.get("accuracy")), percent(valid.get("accuracy"))]
            cells += [rate(train.get("images_per_s")), percent(train.get("wait_share"))]
            table.add_row(*cells)
        return table


def print_result(console: Console, result: Row) -> None:
    """The table by stage that ends a run: accuracy of every head, losses, speed and waits."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in _RESULT_HEADER.values():
        table.add_column(column, justify="right", no_wrap=True)
    for cells in table_rows(result):
        table.add_row(*(cell for column, cell in zip(TABLE_HEADER, cells, strict=True) if column in _RESULT_HEADER))
    console.print(table)
    if recoveries := result["recoveries"]:
        times = ", ".join(f"stage {one['stage']} in {one['linked_s']:.1f} s" for one in recoveries)
        console.print(f"replaced alone: {times}", highlight=False, soft_wrap=True)
    seconds = result["train_s"]
    if seconds is not None:
        slowest = rate(result["images_per_s"])
        console.print(
            f"{result['num_steps'] - result['first_step']} steps in {seconds:.0f} s, {slowest} images/s",
            highlight=False,
        )
