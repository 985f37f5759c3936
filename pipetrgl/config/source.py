"""A config file as a tree in which every value remembers the line it was written on.

YAML 1.2's plain scalars are used in place of PyYAML's 1.1: 3e-4 is a float, `on` and `yes` are text, 010 is ten.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

MAX_VALUES = 10_000
MAX_DEPTH = 20

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]


@dataclass(frozen=True)
class Origin:
    """Where something was written; no file means an override on the command line."""

    file: Path | None
    line: int = 0


@dataclass(frozen=True)
class Entry:
    """A value and where it was written: for a key of a mapping, the line of the key."""

    value: Scalar | list[Entry] | dict[str, Entry]
    origin: Origin


@dataclass(frozen=True)
class Problem:
    """One row of the error message."""

    text: str
    origin: Origin | None = None
    hides_values: bool = False
    """Values are missing because of it, so rules over several values cannot be judged."""


class BrokenText(Exception):
    """This text cannot be read any further."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.text, self.line = text, line


_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
_PLAIN_SCALARS = [
    ("bool", "tTfF", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("null", ["~", "n", "N", ""], re.compile(r"~|null|Null|NULL|")),
    ("int", "-+0123456789", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", "-+.0123456789", re.compile(_FLOAT)),
    ("merge", "<", re.compile(r"<<")),
]
_PATTERNS = {_TAG + name: pattern for name, _, pattern in _PLAIN_SCALARS}


def add_plain_scalars(resolver: type[yaml.resolver.BaseResolver]) -> None:
    """Teach a loader or dumper which unquoted words are not text."""
    for name, first, pattern in _PLAIN_SCALARS:
        resolver.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{pattern.pattern})\Z"), list(first))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
add_plain_scalars(_Loader)


def _scalar(node: yaml.ScalarNode) -> Scalar:
    text, kind = str(node.value), node.tag.removeprefix(_TAG)
    if kind == "str":
        return text
    # More than 100 digits are no setting, and Python refuses to print integers of several thousand.
    if node.tag not in _PATTERNS or not _PATTERNS[node.tag].fullmatch(text) or len(text) > 100:
        raise ValueError
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text.lower() == "true" if kind == "bool" else None


def printable(key: str) -> str:
    """A key as shown in a message: on one line, not too long."""
    text = key if key.isprintable() and key else repr(key)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Tree:
    """Turns the YAML nodes of one text into entries and notes the faults on the way."""

    def __init__(self, file: Path | None, problems: list[Problem]) -> None:
        self.file = file
        self.problems = problems
        self.num_values = 0

    def entry(self, node: yaml.Node, path: tuple[str, ...], line: int) -> Entry | None:
        """The entry of a node; None if its fault has been noted."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise BrokenText(f"more than {MAX_VALUES} values; aliases of aliases?", line)
        if len(path) > MAX_DEPTH:
            raise BrokenText(f"nested deeper than {MAX_DEPTH} levels; does an alias contain itself?", line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Entry(self._mapping(node, path), Origin(self.file, line))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self.entry(item, (*path, str(i)), _line(item)) for i, item in enumerate(node.value)]
            good = [item for item in items if item]
            return Entry(good, Origin(self.file, line)) if len(good) == len(items) else None
        if isinstance(node, yaml.ScalarNode):
            with contextlib.suppress(ValueError):
                return Entry(_scalar(node), Origin(self.file, line))
        text = f"{node.tag.replace(_TAG, '!!')} {node.value if isinstance(node, yaml.ScalarNode) else ''}".strip()
        self._fault(path, f"cannot read '{printable(text)}'; use plain values", line)
        return None

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Entry]:
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                what = "a list" if isinstance(key_node, yaml.SequenceNode) else "a mapping"
                self._fault(path, f"a key must be a name, not {what}; quote text that holds {{}} or []", line)
                continue
            key = str(key_node.value)
            if key in lines:
                self._fault((*path, key), f"written twice, the first time on line {lines[key]}", line)
            lines[key] = line
            if key_node.tag == _TAG + "merge":
                merged = self._merged(value_node, path, line) | merged
            elif key_node.tag != _TAG + "str":
                kind = key_node.tag.removeprefix(_TAG)
                self._fault(path, f"the key '{printable(key)}' is of type {kind}; a key must be a name", line)
            else:
                entry = self.entry(value_node, (*path, key), line)
                own |= {key: entry} if entry else {}
        return merged | own

    def _merged(self, node: yaml.Node, path: tuple[str, ...], line: int) -> dict[str, Entry]:
        """What `<<: *anchor` or `<<: [*one, *two]` stands for; the earlier mapping wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Entry] = {}
        for source in sources:
            # One level deeper, so that a mapping merged into itself meets the limit.
            entry = self.entry(source, (*path, "<<"), line)
            if entry and isinstance(entry.value, dict):
                result = entry.value | result
            else:
                self._fault((*path, "<<"), "expected an alias of a mapping, such as *anchor", line)
        return result

    def _fault(self, path: tuple[str, ...], text: str, line: int) -> None:
        place = f"{dotted(path)}: " if path else ""
        self.problems.append(Problem(place + text, Origin(self.file, line), hides_values=True))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def dotted(path: tuple[str, ...]) -> str:
    return ".".join(printable(key) for key in path)


_CAUSES = {
    "mapping values are not allowed here": "a second ':' on the line, or wrong indentation above it",
    "found character '\\t' that cannot start any token": "a tab; indent with spaces",
    "could not find expected ':'": "a key without ':'",
    "expected <block end>, but found '<block mapping start>'": "the indentation fits no line above",
    "expected <block end>, but found '<block sequence start>'": "the indentation fits no line above",
    "expected <block end>, but found '-'": "a list where a key was expected",
    "but found another document": "a second document (---); one file is one config",
    "found unexpected end of stream": "a quote that is not closed",
    "second occurrence": "an anchor (&) that is defined twice",
}
_JARGON = {
    "'<stream end>'": "the end of the file",
    "expected <block end>, but found": "a surplus",
    "that cannot start any token": "that cannot start a value; quote it",
    "the node content": "a value",
    "'<scalar>'": "value",
}


def _cause(error: yaml.MarkedYAMLError) -> tuple[str, int]:
    problem = error.problem or error.context or "syntax error"
    mark = error.problem_mark or error.context_mark
    # What never ends is noticed at the end of the file; what the user looks for is where it begins.
    if "end>'" in problem or "end of stream" in problem or "find expected ':'" in problem:
        mark = error.context_mark or mark
    text = _CAUSES.get(problem, problem)
    for jargon, words in _JARGON.items():
        text = text.replace(jargon, words)
    return f"not valid YAML: {text}", mark.line + 1 if mark else 1


def _compose(text: str) -> yaml.Node | None:
    """The YAML node graph of a text; None if it holds nothing.

    Raises:
        BrokenText: not valid YAML.
    """
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise BrokenText(*_cause(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        shown = error.character if isinstance(error.character, int) else ord(error.character)
        raise BrokenText(f"not valid YAML: unprintable character 0x{shown:02x}; is this a text file?", line) from None
    except RecursionError:
        raise BrokenText(f"nested deeper than {MAX_DEPTH} levels", 1) from None
    except (ValueError, OverflowError):  # PyYAML lets them through, for example of the escape U99999999
        raise BrokenText("not valid YAML: an escape or version number out of range", 1) from None


def parse(text: str, file: Path | None, problems: list[Problem]) -> Entry:
    """Read one YAML text.

    Args:
        file: where the text is from; None for an override.
        problems: gets the faults that leave the rest readable.
    Raises:
        BrokenText: not valid YAML, or beyond the limits above.
    """
    node = _compose(text)
    if node is None:
        return Entry(None, Origin(file, 1))
    return _Tree(file, problems).entry(node, (), _line(node)) or Entry(None, Origin(file, 1))
