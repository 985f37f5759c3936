"""A bench file: a config, the axes of a scaling study over it, and what takes turns with what."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipetrgl.config.explain import explain, plain
from pipetrgl.config.inherit import base_config, merge, read
from pipetrgl.config.load import dump, report, settle
from pipetrgl.config.schema import Config, Folder, NonNegative, Positive, Section
from pipetrgl.config.source import Entry, Origin, Problem
from pipetrgl.errors import ConfigError, nearest

Codec = Literal["fp32", "bf16", "fp16", "int8"]
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zero_bubble_v")
"""Torch's, each with every number of micro-batches."""
CONTENDERS = (
    "pipetrgl", "stages", "independent", "serial", "end_to_end", "end_to_end/threads2", "ddp", *SCHEDULES,
)  # fmt: skip
_ON_SEVERAL_WORKERS = ("stages", "independent", "ddp", *SCHEDULES)
_WITH_LINKS = ("pipetrgl", "stages", "independent", "serial")


class StrongSection(Section):
    """The same rows on more and more workers."""

    workers: list[Positive] = Field(default=[])
    """Numbers of stages, each on a worker of its own; empty: no strong scaling."""
    batch: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None
    """Rows of one optimizer step, or several such numbers; unset: the config's train.batch."""


class WeakSection(Section):
    """As many rows more as there are workers."""

    workers: list[Positive] = Field(default=[])
    """Numbers of stages, each on a worker of its own; empty: no weak scaling."""
    batch_per_worker: Positive | Annotated[list[Positive], Field(min_length=1)] = 32
    """Rows of one optimizer step divided by the workers, or several such numbers."""


class ScalingSection(Section):
    """How the number of workers grows."""

    strong: StrongSection = StrongSection()
    weak: WeakSection = WeakSection()


class BenchSection(Section):
    """The keys of a bench file; what lies below `config` is a config."""

    name: str | None = None
    """Start of the folder's name; unset: the file's name."""
    folder: Folder = "runs"
    """Parent of the bench's folder, relative to the working directory."""
    config: str
    """A config file, relative to this one, or a section with `defaults:` and options. The bench sets pipeline.stages,
    model.cuts, train.batch, channel.capacity and channel.codec."""
    scaling: ScalingSection = ScalingSection()
    cuts: Literal["even", "parameters", "planned"] | list[Positive] | list[str] = "planned"
    """planned: the cuts whose slowest stage is fastest, by a profile that the bench takes of each batch and codec; else
    as model.cuts."""
    capacity: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Values of channel.capacity; unset: the config's. Peers without our links run with the first alone."""
    codec: Annotated[list[Codec], Field(min_length=1)] | None = None
    """Values of channel.codec; unset: the config's. Peers without our links run with the first alone."""
    contenders: Annotated[list[str], Field(min_length=1)] = Field(default=["pipetrgl", "serial"])
    """What takes turns at every point; stages: each alone. On one worker only those that need no second."""
    micro_batches: Annotated[list[Positive], Field(min_length=1)] = Field(default=[4])
    """M of torch's schedules: each value is a contender of its own."""
    rounds: Annotated[int, Field(ge=3)] = 5
    """Turns of each contender at each point."""
    batches: Positive = 20
    """Counted optimizer steps of a turn."""
    warm_up: NonNegative = 5
    """Optimizer steps before the counted ones of a turn."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise ValueError(f"{name!r} cannot start a folder's name; expected letters, digits and . _ + -")
        return name

    @field_validator("contenders")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if wrong := [
            f"{name!r} is not allowed. {nearest(name, CONTENDERS)}" for name in names if name not in CONTENDERS
        ]:
            raise ValueError("; ".join(wrong))
        return names

    @model_validator(mode="after")
    def _something_to_measure(self) -> BenchSection:
        faults = []
        if not self.scaling.strong.workers and not self.scaling.weak.workers:
            faults.append("scaling.strong.workers: expected workers here, or under scaling.weak, such as [1, 2]")
        if "micro_batches" in self.model_fields_set and not set(SCHEDULES) & set(self.contenders):
            faults.append(f"micro_batches: only used with contenders {', '.join(SCHEDULES)}")
        if faults:
            raise ValueError("\n".join(faults))
        return self


@dataclass(frozen=True)
class Point:
    """A place in the grid, at which contenders take turns.

    Attributes:
        workers, batch, capacity, codec: of its config.
        strong, weak: the axes that it lies on.
        contenders: that can run there, the single stages by number.
        config: with these values; the cuts are "even" where the bench shall plan them.
    """

    workers: int
    batch: int
    capacity: int
    codec: str
    strong: bool
    weak: bool
    contenders: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Bench:
    """A bench file, checked.

    Attributes:
        points: in the order of measurement.
        planned: whether cuts are planned.
        text: the file with every value, which loads to an equal bench.
    """

    name: str
    folder: str
    points: tuple[Point, ...]
    planned: bool
    micro_batches: tuple[int, ...]
    rounds: int
    batches: int
    warm_up: int
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of the text in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where a point's values are written."""

    workers: Entry
    batch: Entry
    strong: bool
    weak: bool


def load_bench(path: Path) -> Bench:
    """Read a bench file, and check the config of each of its points.

    Raises:
        ConfigError: every problem of the file and of those it names, one row each with its place.
    """
    problems: list[Problem] = []
    top = read(path, problems)
    keys = top.value if isinstance(top.value, dict) else {}
    head = _head(top, problems)
    base = _base(keys.get("config"), problems)
    whole = settle(_in_stages(base, head), problems)  # its own faults once, whatever the axes
    points = list(_points(head, keys, base, whole, problems)) if head and whole else []
    if problems or head is None or whole is None:
        raise ConfigError(report(path, problems))
    return Bench(
        name=head.name or path.stem,
        folder=head.folder,
        points=tuple(points),
        planned=head.cuts == "planned",
        micro_batches=tuple(head.micro_batches),
        rounds=head.rounds,
        batches=head.batches,
        warm_up=head.warm_up,
        text=_text(head, path, whole),
    )


def _head(top: Entry, problems: list[Problem]) -> BenchSection | None:
    """The keys besides the config, which is checked elsewhere and stands here as if it were right."""
    values = plain(top)
    assert isinstance(values, dict)
    try:
        return BenchSection.model_validate({**values, "config": "-"})
    except ValidationError as error:
        problems.extend(explain(error, top, BenchSection))
        return None


def _base(entry: Entry | None, problems: list[Problem]) -> Entry:
    """The config as a tree: a file, or a section that may inherit from files."""
    if entry is None:
        problems.append(Problem("config: is missing; expected a file name, or a section of options", None, True))
        return Entry({}, Origin(None))
    tree = base_config(entry, problems)
    content = dict(tree.value) if isinstance(tree.value, dict) else {}
    if plan := content.pop("plan", None):
        problems.append(Problem("plan: a bench has cuts of its own; remove it, and use cuts: planned", plan.origin))
    return Entry(content, tree.origin)


def _in_stages(base: Entry, head: BenchSection | None) -> Entry:
    """The config with the first number of workers: its own numbers of stages and cuts do not count in a bench."""
    workers = [*head.scaling.strong.workers, *head.scaling.weak.workers] if head else []
    if not workers:
        return base
    nowhere = Origin(None)
    stages = Entry({"stages": Entry(workers[0], nowhere)}, nowhere)
    cuts = Entry({"cuts": Entry("even", nowhere)}, nowhere)
    return merge(base, Entry({"pipeline": stages, "model": cuts}, nowhere))


def _points(
    head: BenchSection, keys: Mapping[str, Entry], base: Entry, whole: Config, problems: list[Problem]
) -> Iterator[Point]:
    """Every point whose config is right; what is wrong with the others is noted."""
    if whole.train.order != "parallel":
        text = f"train.order: a bench measures the parallel order, and this is '{whole.train.order}'"
        problems.append(Problem(text, _entry(base, "train", "order").origin))
    cuts = Entry("even", keys["config"].origin) if head.cuts == "planned" else keys["cuts"]
    capacities = _items(keys["capacity"]) if head.capacity else [None]
    codecs = _items(keys["codec"]) if head.codec else [None]
    for place in _places(keys["scaling"], whole.train.batch):
        for capacity, codec in itertools.product(capacities, codecs):
            first = capacity is capacities[0] and codec is codecs[0]
            if place.workers.value == 1 and not first:
                continue  # without links
            tree = base
            for section, key, entry in (
                ("pipeline", "stages", place.workers),
                ("model", "cuts", cuts),
                ("train", "batch", place.batch),
                ("channel", "capacity", capacity),
                ("channel", "codec", codec),
            ):
                if entry is not None:
                    tree = merge(tree, Entry({section: Entry({key: entry}, entry.origin)}, entry.origin))
            if config := settle(tree, problems):
                yield Point(
                    workers=config.pipeline.stages,
                    batch=config.train.batch,
                    capacity=config.channel.capacity,
                    codec=config.channel.codec,
                    strong=place.strong,
                    weak=place.weak,
                    contenders=tuple(_names(head, config.pipeline.stages, first)),
                    config=config,
                )


def _places(scaling: Entry, batch: int) -> Iterator[_Place]:
    """The pairs of workers and rows, each once, in the order of the file: strong, then what weak has besides."""
    found: dict[tuple[int, int], _Place] = {}
    here, per_worker = scaling.origin, WeakSection.model_fields["batch_per_worker"].default
    sizes = _items(_entry(scaling, "strong", "batch")) or [Entry(batch, here)]
    for size, workers in itertools.product(sizes, _items(_entry(scaling, "strong", "workers"))):
        found[_number(workers), _number(size)] = _Place(workers, size, strong=True, weak=False)
    sizes = _items(_entry(scaling, "weak", "batch_per_worker")) or [Entry(per_worker, here)]
    for size, workers in itertools.product(sizes, _items(_entry(scaling, "weak", "workers"))):
        total = Entry(_number(size) * _number(workers), size.origin)
        key = (_number(workers), _number(total))
        found[key] = _Place(workers, total, strong=key in found and found[key].strong, weak=True)
    yield from found.values()


def _names(head: BenchSection, workers: int, first: bool) -> Iterator[str]:
    """The contenders of a point, "stages" as "stage 0", "stage 1", ..."""
    for kind in dict.fromkeys(head.contenders):
        if (workers == 1 and kind in _ON_SEVERAL_WORKERS) or (not first and kind not in _WITH_LINKS):
            continue
        if kind == "stages":
            yield from (f"stage {index}" for index in range(workers))
        else:
            yield kind


def _entry(tree: Entry, *path: str) -> Entry:
    """What is written at a path; an empty entry where nothing is."""
    for key in path:
        inner = tree.value.get(key) if isinstance(tree.value, dict) else None
        if inner is None:
            return Entry(None, tree.origin)
        tree = inner
    return tree


def _items(entry: Entry) -> Sequence[Entry]:
    if isinstance(entry.value, list):
        return entry.value
    return [] if entry.value is None else [entry]


def _number(entry: Entry) -> int:
    assert isinstance(entry.value, int)
    return entry.value


def _text(head: BenchSection, path: Path, whole: Config) -> str:
    """The bench with every value, its config written out."""
    content = head.model_dump(exclude={"config"}, exclude_none=True)
    if not set(SCHEDULES) & set(head.contenders):
        del content["micro_batches"]
    content = {"name": head.name or path.stem, **content}
    top = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    config = "\n".join(f"  {line}" if line else "" for line in dump(whole).splitlines())
    return f"{top}config:\n{config}\n"
