"""From a YAML file and `key=value` overrides to a checked Config, and back."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipetrgl.config.explain import explain, plain, ruled_out, section_of
from pipetrgl.config.inherit import merge, read, real, written_at
from pipetrgl.config.planned import planned_times, read_plan
from pipetrgl.config.schema import Config, Section
from pipetrgl.config.source import (
    MAX_DEPTH,
    BrokenText,
    Entry,
    Origin,
    Plain,
    Problem,
    add_plain_scalars,
    parse,
)
from pipetrgl.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, over the files it names under `defaults` and under the overrides.

    Args:
        overrides: such as "train.epochs=3" or "model.cuts=[2, 2]", values in YAML; a later one wins.
    Raises:
        ConfigError: every problem of the files and overrides, one row each with its place.
    """
    problems: list[Problem] = []
    tree = read(path, problems)
    for override in overrides:
        tree = merge(tree, _override(override, problems))
    config = settle(tree, problems)
    if problems or config is None:
        raise ConfigError(report(path, problems))
    return config


def settle(tree: Entry, problems: list[Problem]) -> Config | None:
    """The config that a merged tree describes; what is wrong with it is added to the problems of its files."""
    tree = _with_planned_cuts(_with_absolute_root(tree), problems)
    try:
        return Config.model_validate(_without_empty_sections(plain(tree), Config))
    except ValidationError as error:
        incomplete = any(problem.hides_values for problem in problems)
        problems.extend(problem for problem in explain(error, tree) if not (incomplete and problem.hides_values))
        return None


def _override(text: str, problems: list[Problem]) -> Entry:
    """The tree that holds just this override's value; an empty one if it is malformed."""
    empty = Entry({}, Origin(None))
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    fault = ""
    if not equals or not _KEY.fullmatch(key.strip()) or len(path) > MAX_DEPTH:
        fault = "expected key=value, such as train.epochs=3"
    elif path[0] == "defaults":
        fault = "only a file can name its defaults"
    else:
        try:
            found: list[Problem] = []
            entry = parse(value, None, found)
            fault = "; ".join(problem.text for problem in found)
        except BrokenText as error:
            fault = error.text
    if fault:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        problems.append(Problem(f"override {shown!r}: {fault}", hides_values=True))
        return empty
    if isinstance(entry.value, str) and _is_named(path):
        path.append("name")  # launcher=ray is short for launcher.name=ray
    for part in reversed(path):
        entry = Entry({part: entry}, Origin(None))
    return entry


def _is_named(path: Sequence[str]) -> bool:
    """Whether a path leads to a section that has a name, such as `launcher` or `model.head`."""
    section: type[Section] | None = Config
    for part in path:
        field = section.model_fields.get(part) if section else None
        section = section_of(field) if field else None
    return section is not None and "name" in section.model_fields


def _with_absolute_root(tree: Entry) -> Entry:
    """Read `data.root` from the folder of the file in which it is written, or from the working directory."""
    data = tree.value.get("data") if isinstance(tree.value, dict) else None
    root = data.value.get("root") if data and isinstance(data.value, dict) else None
    if data is None or root is None or not isinstance(root.value, str) or not root.value:
        return tree
    absolute = _absolute(root.value, root.origin)
    return merge(tree, Entry({"data": Entry({"root": Entry(absolute, root.origin)}, data.origin)}, tree.origin))


def _absolute(path: str, origin: Origin) -> str:
    """A path as seen from the file in which it is written, or from the working directory."""
    folder = real(origin.file).parent if origin.file else Path.cwd()
    return os.path.abspath(folder / os.path.expanduser(path))


def _with_planned_cuts(tree: Entry, problems: list[Problem]) -> Entry:
    """Put cuts, stages and replicas of `plan` where a file would write them, and the times of emulated stages.

    None of them may be written beside the plan; as an override, it wins over the files.
    """
    top = tree.value if isinstance(tree.value, dict) else {}
    plan = top.get("plan")
    if plan is None or not isinstance(plan.value, str) or not plan.value or "\0" in plan.value:
        return tree
    device = written_at(tree, ("pipeline", "device"))
    emulated = device is not None and device.value == "emulated"
    written = False
    for keys in _PLANNED + _PLANNED_TIMES * emulated:
        if (entry := written_at(tree, keys)) is not None:
            if plan.origin.file is None and entry.origin.file is not None:
                continue
            written = True
            text = f"{'.'.join(keys)}: the plan sets it ({plan.value}); remove it, or remove plan"
            problems.append(Problem(text, entry.origin))
    if written:
        return tree
    path = _absolute(plan.value, plan.origin)
    try:
        made = read_plan(Path(path))
        times = planned_times(Path(path)) if emulated else {}
    except ConfigError as error:
        problems.append(Problem(f"plan: {error}", plan.origin, hides_values=True))
        return tree
    stages = {"stages": len(made.cuts), "replicas": list(made.replicas)}
    pipeline = {**stages, **({"emulated": times} if times else {})}
    planned = {"plan": path, "model": {"cuts": list(made.cuts)}, "pipeline": pipeline}
    return merge(tree, Entry({key: _written(value, plan.origin) for key, value in planned.items()}, tree.origin))


_PLANNED: tuple[tuple[str, ...], ...] = (("model", "cuts"), ("pipeline", "stages"), ("pipeline", "replicas"))
_PLANNED_TIMES = tuple(("pipeline", "emulated", name) for name in ("forward_s", "backward_s", "update_s", "rows"))


def _written(value: Any, origin: Origin) -> Entry:
    """A value as if it stood at `origin`."""
    if isinstance(value, dict):
        return Entry({key: _written(inner, origin) for key, inner in value.items()}, origin)
    return Entry([Entry(item, origin) for item in value] if isinstance(value, list) else value, origin)


def _without_empty_sections(content: Plain, section: type[Section]) -> Plain:
    """A section with nothing below ("train:" alone) is one with every default, as an empty file is."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        return content
    inner = {key: section_of(field) for key, field in section.model_fields.items()}
    return {
        key: _without_empty_sections(value, below) if (below := inner.get(key)) else value
        for key, value in content.items()
    }


def report(path: Path, problems: Sequence[Problem]) -> str:
    """All problems of a file and of those it inherits from, one row each with its place."""
    main = real(path) if "\0" not in str(path) else path

    def place(problem: Problem) -> tuple[int, str, int, str]:
        """What a row starts with, behind what the rows are sorted by: this file, the inherited ones, the overrides."""
        origin = problem.origin
        if origin is None:
            return 3, "", 0, ""
        if origin.file is None:
            return 2, "", 0, "override"
        if origin.file == main:
            return 0, "", origin.line, f"line {origin.line}"
        name = os.path.relpath(origin.file, main.parent)
        return 1, name, origin.line, f"{name}:{origin.line}"

    rows = list(dict.fromkeys((*place(problem), problem.text) for problem in problems))
    rows.sort(key=lambda row: row[:3])
    width = max(len(start) for *_, start, _ in rows)
    lines = [f"  {start:<{width}}   {text}" if start else f"  {text}" for *_, start, text in rows]
    return "\n".join([f"{len(rows)} problem{'s' if len(rows) > 1 else ''} in {path}", *lines])


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def inline(self, data: Sequence[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.inline)
_Dumper.add_representer(tuple, _Dumper.inline)
# On top of YAML 1.1's, so that text which either version would misread is quoted.
add_plain_scalars(_Dumper)


def dump(config: Config) -> str:
    """The config as YAML with every value, as a run folder keeps it; loads to an equal Config.

    Values that a rule forbids to write beside the others, such as tau with multipliers, are left out: defaults. So is
    `plan`, in favour of the cuts, stages and replicas that it set: the file may change or go.
    """
    config = config.model_copy(update={"plan": None})
    content = config.model_dump(exclude={"plan"})
    while True:
        try:
            again = Config.model_validate(content)
            break
        except ValidationError as error:
            for *sections, key in ruled_out(error):
                del functools.reduce(_below, sections, content)[key]
    assert again == config, "a value that differs from its default was left out; was the config built without checks?"
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1000)


def _below(content: Any, key: str) -> Any:
    return content[int(key)] if isinstance(content, list) else content[key]


def undump(text: str) -> Config:
    """The inverse of `dump`."""
    return Config.model_validate(yaml.safe_load(text))


def config_hash(config: Config) -> str:
    """SHA-256 in hex of all that changes what is trained, so that the workers of one run can compare."""
    content = config.model_dump(exclude={"plan", "launcher", "run", "metrics", "trace", "checkpoint"})
    # a data set may be mounted elsewhere on another machine
    del content["data"]["root"], content["data"]["prefetch"]
    content["channel"] = {"codec": config.channel.codec}
    if config.train.order != "end_to_end":
        del content["train"]["schedule"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> str:
    """JSON Schema of the file, for editors."""
    schema = Config.model_json_schema()
    name = {"type": "string", "minLength": 1}
    defaults = {
        "description": "Files to inherit from, relative to this one; a later file wins, and this one wins over all.",
        "anyOf": [name, {"type": "array", "items": name}],
    }
    schema["properties"] = {"defaults": defaults, **schema["properties"]}
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2, allow_nan=False)
