"""A config file together with the files that it names under `defaults`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from pipetrgl.config.source import BrokenText, Entry, Origin, Problem, parse

MAX_BYTES = 256 * 1024
MAX_FILES_DEEP = 20


class _Unreadable(Exception):
    """A file cannot be opened; the message ends a sentence about it."""


def merge(base: Entry, over: Entry) -> Entry:
    """Mappings merge key by key, anything else replaces; an empty section ("train:" alone) replaces nothing."""
    if not isinstance(base.value, dict):
        return over
    if over.value is None:
        return base
    if not isinstance(over.value, dict):
        return over
    both = {key: merge(base.value[key], entry) if key in base.value else entry for key, entry in over.value.items()}
    return Entry(base.value | both, over.origin)


def real(path: Path) -> Path:
    """The one name of a file, whatever links and dots lead to it; unlike Path.resolve, takes link loops."""
    return Path(os.path.realpath(path))


def read(path: Path, problems: list[Problem]) -> Entry:
    """The mapping in `path` merged over its defaults; what cannot be read is noted and counts as empty."""
    try:
        content = _content(path, path)
    except _Unreadable as error:
        problems.append(Problem(f"the file {error}", hides_values=True))
        return Entry({}, Origin(path, 1))
    return _Files(problems).read(real(path), content, ())


def base_config(entry: Entry | None, problems: list[Problem]) -> Entry:
    """The config below the key `config` of another kind of file: a file's name, or a section that may inherit."""
    if entry is None or not isinstance(entry.value, str | dict):
        origin = entry.origin if entry else None
        problems.append(Problem("config: expected a file name, or a section of options", origin, hides_values=True))
        return Entry({}, Origin(None))
    if isinstance(entry.value, str):
        return _named(entry, problems)
    options = {key: inner for key, inner in entry.value.items() if key != "defaults"}
    tree, defaults = Entry({}, entry.origin), entry.value.get("defaults", Entry([], entry.origin))
    for name in defaults.value if isinstance(defaults.value, list) else [defaults]:
        if isinstance(name.value, str):
            tree = merge(tree, _named(name, problems))
        else:
            text = "config.defaults: expected a file name or a list of file names"
            problems.append(Problem(text, name.origin, hides_values=True))
    return merge(tree, Entry(options, entry.origin))


def _named(name: Entry, problems: list[Problem]) -> Entry:
    """A config file, relative to the file in which it is named."""
    folder = real(name.origin.file).parent if name.origin.file else Path()
    found: list[Problem] = []
    tree = read(folder / Path(str(name.value)).expanduser(), found)
    for problem in found:
        if problem.origin is None:  # of the whole file: say which, and where it is named
            problem = Problem(f"config: {str(name.value)!r}: {problem.text}", name.origin, problem.hides_values)
        problems.append(problem)
    return tree


def written_at(tree: Entry, keys: Sequence[str]) -> Entry | None:
    """What is written at a path, if anything is."""
    found: Entry | None = tree
    for key in keys:
        found = found.value.get(key) if found is not None and isinstance(found.value, dict) else None
    return found


class _Files:
    """Reads each file once, so that files which include each other crosswise cost no more than their number."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.done: dict[Path, Entry] = {}

    def read(self, file: Path, content: bytes, chain: tuple[Path, ...]) -> Entry:
        top = self._parse(file, content)
        if not isinstance(top.value, dict):
            return top
        defaults = top.value.pop("defaults", None)
        result = Entry({}, top.origin)
        if defaults is not None:
            for name in self._names(defaults):
                result = merge(result, self._include(file, name, (*chain, file)))
        return merge(result, top)

    def _parse(self, file: Path, content: bytes) -> Entry:
        empty = Entry({}, Origin(file, 1))
        try:
            top = parse(_decode(content), file, self.problems)
        except BrokenText as error:
            self.problems.append(Problem(error.text, Origin(file, error.line), hides_values=True))
            return empty
        if isinstance(top.value, dict):
            return top
        if top.value is not None:
            what = "a list" if isinstance(top.value, list) else "a single value"
            text = f"the file is {what}; expected sections such as 'train:' with 'epochs: 3' below"
            self.problems.append(Problem(text, top.origin, hides_values=True))
        return empty

    def _names(self, defaults: Entry) -> list[Entry]:
        entries = defaults.value if isinstance(defaults.value, list) else [defaults]
        good = [entry for entry in entries if isinstance(entry.value, str) and entry.value]
        if len(good) < len(entries) and defaults.value is not None:
            self._fault(defaults, "expected a file name or a list of file names")
        return good

    def _include(self, file: Path, entry: Entry, chain: tuple[Path, ...]) -> Entry:
        empty, name = Entry({}, entry.origin), str(entry.value)
        try:
            path = file.parent / Path(name).expanduser()
            base = real(path)
            if base in chain:
                names = " -> ".join(link.name for link in (*chain[chain.index(base) :], base))
                self._fault(entry, f"the files include each other: {names}")
                return empty
            if len(chain) >= MAX_FILES_DEEP:
                self._fault(entry, f"more than {MAX_FILES_DEEP} files deep")
                return empty
            if base not in self.done:
                self.done[base] = self.read(base, _content(path, Path(name)), chain)
            return self.done[base]
        except (_Unreadable, ValueError, RuntimeError) as error:  # the latter two: a NUL, an unknown ~user
            self._fault(entry, f"{name!r} {error if isinstance(error, _Unreadable) else 'is no file name'}")
            return empty

    def _fault(self, entry: Entry, text: str) -> None:
        self.problems.append(Problem(f"defaults: {text}", entry.origin, hides_values=True))


def _content(path: Path, written: Path) -> bytes:
    """The bytes of a file, which the user wrote as `written`."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _Unreadable(f"does not exist{_similar(path, written)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _Unreadable(f"cannot be read: {reason.lower()}") from None
    if len(content) > MAX_BYTES:
        raise _Unreadable(f"is larger than {MAX_BYTES // 1024} KiB; is this a config?")
    return content


def _similar(path: Path, written: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {str(written.parent)!r}"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f". Did you mean '{written.parent / matches[0]}'?" if matches else ""


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BrokenText(f"not valid YAML: byte 0x{content[error.start]:02x} is not UTF-8 text", line) from None
