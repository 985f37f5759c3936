"""A study file: one base config, its variants, the seeds, and what is compared with what."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipetrgl.config.explain import explain, plain, show
from pipetrgl.config.inherit import base_config, merge, read, written_at
from pipetrgl.config.load import report, settle
from pipetrgl.config.schema import Config, NonNegative, Positive, Section
from pipetrgl.config.source import Entry, Origin, Problem
from pipetrgl.errors import ConfigError, nearest

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# a key of a variant, down to the option: the study gives each training its own
_SET_BY_STUDY = ("seed", "plan", "run", "checkpoint", "metrics.every", "trace", "evaluate.test_at_end", "defaults")


class StudySection(Section):
    """The keys of a study file; the sections of its variants are those of a config."""

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")] | None = None
    """Of the study and its folder; unset: the file's name."""
    config: str
    """The base: a config file, relative to this one, or a section with `defaults:` and options."""
    cases: dict[str, str] = Field(default={})
    """Conditions in each of which all variants are trained, and compared with each other: a section of options each."""
    variants: dict[str, str]
    """What is compared: a section of options each, written in full or as dotted keys; and `choose`."""
    baseline: str | Annotated[list[str], Field(min_length=1)] | None = None
    """What the others are compared with, seed by seed: a variant, case/variant, or a list; unset: the first variant."""
    seeds: Positive | Annotated[list[NonNegative], Field(min_length=1)]
    """A list, or how many from 0 on."""
    jobs: Positive = 1
    """Trainings that run at the same time, each in a process of its own."""


@dataclass(frozen=True)
class Arm:
    """One config of a study, trained once a seed.

    Attributes:
        case: "" where the file has no cases.
        variant: its name.
        candidate: "" where the variant chooses nothing, else such as "tau=0.5".
        config: with the base's seed.
    """

    case: str
    variant: str
    candidate: str
    config: Config

    @property
    def place(self) -> str:
        """`case/variant/candidate`, without those that are not there."""
        return "/".join(part for part in (self.case, self.variant, self.candidate) if part)


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        cases: `("",)` where the file has none.
        baselines: each a variant, or case/variant.
        arms: in the order of the file: cases, variants, candidates.
    """

    name: str
    cases: tuple[str, ...]
    variants: tuple[str, ...]
    baselines: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    arms: tuple[Arm, ...]


def load_study(path: Path) -> Study:
    """Read a study file, and check the config of each of its variants.

    Raises:
        ConfigError: every problem of the file and of those it names, one row each with its place.
    """
    problems: list[Problem] = []
    top = read(path, problems)
    keys = top.value if isinstance(top.value, dict) else {}
    cases = _sections(keys.get("cases"), "cases", problems)
    variants = _sections(keys.get("variants"), "variants", problems)
    head = _head(keys, problems)
    _check_baselines(keys.get("baseline"), cases, variants, problems)
    base = base_config(keys.get("config"), problems)
    arms = list(_arms(base, cases or {"": Entry({}, top.origin)}, variants, problems))
    if problems or head is None:
        raise ConfigError(report(path, problems))
    seeds = tuple(range(head.seeds)) if isinstance(head.seeds, int) else tuple(head.seeds)
    baselines = [head.baseline] if isinstance(head.baseline, str) else head.baseline
    return Study(
        head.name or path.stem, tuple(cases or {"": None}), tuple(variants), tuple(baselines or [next(iter(variants))]),
        seeds, head.jobs, tuple(arms),
    )  # fmt: skip


def _head(keys: Mapping[str, Entry], problems: list[Problem]) -> StudySection | None:
    """The keys besides the sections, which are checked elsewhere and stand here as if they were right."""
    known = {key: entry for key, entry in keys.items() if key in StudySection.model_fields}
    for key in keys.keys() - known.keys():
        hint = nearest(key, [*StudySection.model_fields, "defaults"])
        if key in Config.model_fields:
            hint = f"It is an option of a config: write it below 'config', a case or a variant. {hint}"
        problems.append(Problem(f"{key}: unknown key. {hint}", keys[key].origin, hides_values=True))
    stand_ins = {"config": "-", "cases": {}, "variants": {}}
    tree = Entry(known, Origin(None))
    try:
        values = {key: plain(entry) for key, entry in known.items()}
        head = StudySection.model_validate(values | stand_ins)
    except ValidationError as error:
        problems.extend(explain(error, tree, StudySection))
        return None
    if isinstance(head.seeds, list) and len(set(head.seeds)) < len(head.seeds):
        problems.append(Problem(f"seeds: {show(list(head.seeds))} names one twice", keys["seeds"].origin))
    return head


def _check_baselines(
    entry: Entry | None, cases: Mapping[str, Entry], variants: Mapping[str, Entry], problems: list[Problem]
) -> None:
    if entry is None or not variants:
        return
    allowed = [*variants, *(f"{case}/{variant}" for case in cases for variant in variants)]
    for name in entry.value if isinstance(entry.value, list) else [entry]:
        if isinstance(name.value, str) and name.value not in allowed:
            text = f"baseline: {name.value!r} is no variant. {nearest(name.value, allowed)}"
            problems.append(Problem(text, name.origin))


def _sections(entry: Entry | None, key: str, problems: list[Problem]) -> dict[str, Entry]:
    """The named sections below `cases` or `variants`, each with its dotted keys spread out."""
    if entry is None or entry.value in (None, {}):
        if key == "variants":
            origin = entry.origin if entry else None
            problems.append(Problem("variants: is missing; expected a section with a name for each", origin, True))
        return {}
    if not isinstance(entry.value, dict):
        problems.append(Problem(f"{key}: expected a section with a name for each", entry.origin, hides_values=True))
        return {}
    found = {}
    for name, section in entry.value.items():
        where = f"{key}.{name}"
        if not _NAME.fullmatch(name):
            text = "a name holds letters, digits and . _ + -, and starts with a letter or digit: it names a folder"
            problems.append(Problem(f"{where}: {text}", section.origin, hides_values=True))
        elif section.value is not None and not isinstance(section.value, dict):
            problems.append(Problem(f"{where}: expected a section of options", section.origin, hides_values=True))
        else:
            found[name] = _spread(section, where, problems)
    return found


def _spread(section: Entry, where: str, problems: list[Problem]) -> Entry:
    """`objective.transport.tau: 1` as three nested sections; `choose` stays as it is."""
    tree = Entry({}, section.origin)
    for key, entry in (section.value if isinstance(section.value, dict) else {}).items():
        if key == "choose":
            part = {key: entry}
        else:
            part = {key.split(".")[0]: _nested(key.split(".")[1:], entry)}
            for own in _SET_BY_STUDY:
                if written_at(Entry(part, section.origin), own.split(".")):
                    text = f"{where}: {own} is the study's to set; remove it"
                    problems.append(Problem(text, entry.origin, hides_values=True))
        tree = merge(tree, Entry(part, section.origin))
    return tree


def _nested(keys: Sequence[str], entry: Entry) -> Entry:
    for key in reversed(keys):
        entry = Entry({key: entry}, entry.origin)
    return entry


def _arms(
    base: Entry, cases: Mapping[str, Entry], variants: Mapping[str, Entry], problems: list[Problem]
) -> Iterator[Arm]:
    """Every arm whose config is right; what is wrong with the others is noted, once for all arms that share it."""
    before = list(problems)
    wrong: dict[Problem, list[str]] = defaultdict(list)
    unsuited: dict[Problem, list[str]] = defaultdict(list)
    all_places, good_places = [], []
    for (case, condition), (variant, own) in itertools.product(cases.items(), variants.items()):
        options = dict(own.value) if isinstance(own.value, dict) else {}
        choose = options.pop("choose", None)
        merged = functools.reduce(merge, (condition, Entry(options, own.origin)), base)
        for candidate, picked in _candidates(choose, f"variants.{variant}.choose", problems):
            tree, found = merge(merged, picked), list(before)
            config = settle(tree, found)
            arm = Arm(case, variant, candidate, config or Config())
            all_places.append(arm.place)
            for problem in found[len(before) :]:
                wrong[problem].append(arm.place)
            if config is not None:
                good_places.append(arm.place)
                for problem in _unsuited(config, tree):
                    unsuited[problem].append(arm.place)
                yield arm
    for faults, everywhere in ((wrong, all_places), (unsuited, good_places)):
        for problem, places in faults.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            whose = f" (in {places[0]}{more})" if len(places) < len(everywhere) else ""
            problems.append(Problem(f"{problem.text}{whose}", problem.origin))


def _candidates(choose: Entry | None, where: str, problems: list[Problem]) -> Iterator[tuple[str, Entry]]:
    """Every combination of the values under `choose`: its name, such as "tau=0.5,lr=0.1", and its options."""
    if choose is None:
        yield "", Entry({}, Origin(None))
        return
    lists = choose.value if isinstance(choose.value, dict) else {}
    if not lists:
        text = f"{where}: expected options, each with its list of values, such as objective.transport.tau: [0.5, 1]"
        problems.append(Problem(text, choose.origin, hides_values=True))
    for key, values in lists.items():
        scalars = values.value if isinstance(values.value, list) else []
        names = [show(plain(value)) for value in scalars]
        if not names or any(isinstance(value.value, list | dict) for value in scalars):
            text = f"{where}.{key}: expected a list of single values"
            problems.append(Problem(text, values.origin, hides_values=True))
        elif len(set(names)) < len(names):
            problems.append(Problem(f"{where}.{key}: names one value twice", values.origin, hides_values=True))
    good = {key: values.value for key, values in lists.items() if isinstance(values.value, list)}
    for combination in itertools.product(*good.values()):
        picked = Entry({}, choose.origin)
        names = []
        for key, value in zip(good, combination, strict=True):
            picked = merge(picked, _nested(key.split("."), value))
            text = value.value if isinstance(value.value, str) else show(plain(value))
            names.append(f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9_.+-]', '_', str(text))}")
        yield ",".join(names), picked


def _unsuited(config: Config, tree: Entry) -> Iterator[Problem]:
    """What makes a good config useless for a study: it must choose the epoch and the head on validation."""
    every, fraction = config.evaluate.valid_every, config.data.valid_fraction
    faults = {}
    if every == 0 or every != int(every):
        faults["evaluate.valid_every"] = (
            f"{every:g} is not allowed in a study; expected a whole number of epochs, from 1"
        )
    if fraction == 0:
        faults["data.valid_fraction"] = "0 is not allowed in a study, which chooses on the validation split"
    for key, text in faults.items():
        entry = written_at(tree, key.split("."))
        yield Problem(f"{key}: {text}", entry.origin if entry else None)
