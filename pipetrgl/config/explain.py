"""What the schema says about a value, in words: pydantic's errors become rows of ours."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipetrgl.config.schema import Config, Section
from pipetrgl.config.source import Entry, Origin, Plain, Problem, dotted
from pipetrgl.errors import nearest

Path = tuple[str, ...]

_NOUNS: dict[object, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
}
_BOUNDS = {"gt": "greater than {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds; None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def section_in(kind: Any) -> type[Section] | None:
    """The section of which a type is a list; None for any other type."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return item if isinstance(item, type) and issubclass(item, Section) else None


def explain(error: ValidationError, tree: Entry, root: type[Section] = Config) -> Iterator[Problem]:
    """One problem for each wrong value, unknown key or broken rule; the branches of a union make one together.

    Args:
        tree: what was validated.
        root: the section that the whole tree is.
    """
    seen: set[Path] = set()
    for detail in error.errors(include_url=False):
        path, section, field = _locate(detail["loc"], root)
        if detail["type"] == "extra_forbidden":
            yield Problem(f"{dotted(path)}: unknown key. {_similar_key(path, section)}", _origin(tree, path))
        elif detail["type"] == "value_error":
            message = str(detail["ctx"]["error"])
            for place, text in [(path, message)] if field else _rules(path, section, message):
                yield Problem(f"{dotted(place)}: {text}", _origin(tree, place), hides_values=field is None)
        elif detail["type"] == "missing" and field and len(path) == len(detail["loc"]):  # else an item of a tuple
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            yield Problem(f"{dotted(path)}: is missing; expected {describe(kind)}", _origin(tree, path))
        elif path not in seen:
            seen.add(path)
            expected = _wrong_value(_value(tree, path), field) if field else _wrong_section(_value(tree, path), section)
            yield Problem(f"{dotted(path)}: {expected}", _origin(tree, path))


def ruled_out(error: ValidationError) -> set[Path]:
    """The fields that section validators complain about."""
    found: set[Path] = set()
    for detail in error.errors(include_url=False):
        path, section, _ = _locate(detail["loc"])
        found.update(place for place, _ in _rules(path, section, str(detail["ctx"]["error"])))
    return found


def _rules(path: Path, section: type[Section], message: str) -> Iterator[tuple[Path, str]]:
    """The fields and texts of a section validator's message, whose lines are "field: text"."""
    for line in message.split("\n"):
        name, separator, text = line.partition(": ")
        below = tuple(name.split("."))
        if separator and _locate(below, section)[2] is not None:
            yield (*path, *below), text
        else:
            yield path, line


def _locate(loc: Sequence[int | str], section: type[Section] = Config) -> tuple[Path, type[Section], FieldInfo | None]:
    """The field that a pydantic location lies in, without the indices and union branches that may follow.

    Returns:
        Its path, the section it is a key of, and the field; for a section itself that section and no field. In a list
        of sections the path holds the index.
    """
    path: Path = ()
    parts = iter(loc)
    for part in parts:
        path = (*path, str(part))
        field = section.model_fields.get(str(part))
        if field is None:
            return path, section, None
        inner = section_of(field)
        if inner is None:
            inner, index = section_in(field.annotation), next(parts, None)
            if inner is None or index is None:
                return path, section, field
            path = (*path, str(index))
        section = inner
    return path, section, None


def _find(tree: Entry, path: Path) -> tuple[Entry, int]:
    """The deepest entry on the way along a path, and how many keys of the path lead to it."""
    for depth, key in enumerate(path):
        if isinstance(tree.value, list) and key.isdecimal() and int(key) < len(tree.value):
            tree = tree.value[int(key)]
        elif isinstance(tree.value, dict) and key in tree.value:
            tree = tree.value[key]
        else:
            return tree, depth
    return tree, len(path)


def _origin(tree: Entry, path: Path) -> Origin | None:
    entry, depth = _find(tree, path)
    return entry.origin if depth else None


def _value(tree: Entry, path: Path) -> Plain:
    return plain(_find(tree, path)[0])


def plain(entry: Entry) -> Plain:
    """The values alone."""
    if isinstance(entry.value, dict):
        return {key: plain(inner) for key, inner in entry.value.items()}
    return [plain(item) for item in entry.value] if isinstance(entry.value, list) else entry.value


def _similar_key(path: Path, section: type[Section]) -> str:
    key = path[-1]
    if "." in key:
        return f"Dotted keys are for overrides; in a file write '{key.split('.')[0]}:' and the rest indented below."
    hint = nearest(key, [*section.model_fields, *(["defaults"] if len(path) == 1 else [])])
    elsewhere = [found for found in _all_fields(Config) if found[-1] == key]
    if hint.startswith("Allowed") and 0 < len(elsewhere) <= 3:
        return f"Did you mean {' or '.join(repr(dotted(found)) for found in elsewhere)}? {hint}"
    return hint


def _all_fields(section: type[Section]) -> Iterator[Path]:
    for key, field in section.model_fields.items():
        inner = section_of(field)
        yield (key,)
        for below in _all_fields(inner) if inner else ():
            yield (key, *below)


def _wrong_section(value: Plain, section: type[Section]) -> str:
    return f"{_is_a(value)}; expected a section with some of: {', '.join(section.model_fields)}"


def _wrong_value(value: Plain, field: FieldInfo) -> str:
    """Why a value does not fit a field: its type, its range, or a choice that does not exist."""
    kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    arms = list(_arms(kind))
    choices = [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]
    if isinstance(value, str) and choices:
        others = "".join(f", or {describe(arm)}" for arm in arms if get_origin(arm) is not Literal)
        return f"{show(value)} is not allowed. {nearest(value, choices)[:-1]}{others}."
    expected = describe(kind)
    if type(value) not in {accepted for arm in arms for accepted in _accepts(arm)}:
        return f"{_is_a(value)}; expected {expected}"
    if isinstance(value, float) and not math.isfinite(value):
        fault = "is not a number" if math.isnan(value) else "is not finite"
    else:
        fault = "is out of range" if isinstance(value, int | float) else "is not allowed"
    return f"{show(value)} {fault}; expected {expected}"


def _arms(kind: Any) -> Iterator[Any]:
    """The alternatives of a union; any other type is its own only one."""
    if get_origin(kind) in (Union, types.UnionType):
        for arm in get_args(kind):
            yield from _arms(arm)
    else:
        yield kind


def _accepts(kind: Any) -> set[type]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _accepts(get_args(kind)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(kind)}
    if origin in (list, tuple):
        return {list}
    if origin is dict:
        return {dict}
    return {int, float} if kind is float else {kind}


def describe(kind: Any, plural: bool = False) -> str:
    """A type of the schema in words.

    >>> describe(Annotated[int, Field(gt=0)])
    'an integer greater than 0'
    >>> describe(float | list[float])
    'a number, or a list of numbers'
    """
    arms, origin, args = list(_arms(kind)), get_origin(kind), get_args(kind)
    if len(arms) > 1:
        return ", or ".join(describe(arm) for arm in arms)
    if origin is Annotated:
        return f"{describe(args[0], plural)}{_bounds(args[1:])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {len(args)} {describe(args[0], plural=True)}"
    if section := section_in(kind):
        return f"a list of sections with {', '.join(section.model_fields)}"
    if origin is list:
        return f"a list of {describe(args[0], plural=True)}"
    if origin is dict:
        return f"{'sections' if plural else 'a section'} of names and {describe(args[1], plural=True)}"
    return "null" if kind is types.NoneType else _NOUNS[kind][plural]


def _bounds(metadata: Sequence[Any]) -> str:
    """The limits in pydantic's metadata, such as " greater than 0 and below 1"."""
    flat = [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
    texts = [
        text.format(getattr(limit, name)) for limit in flat for name, text in _BOUNDS.items() if hasattr(limit, name)
    ]
    first = " of " if texts and texts[0].startswith("at ") else " " if texts else ""
    infinite = " (or .inf)" if any(getattr(limit, "allow_inf_nan", False) for limit in flat) else ""
    filled = " that is not empty" if any(hasattr(limit, "min_length") for limit in flat) else ""
    return f"{first}{' and '.join(texts)}{infinite}{filled}"


_TYPES = {bool: "a bool", int: "an int", float: "a float", str: "a str", list: "a list", dict: "a mapping"}


def _is_a(value: Plain) -> str:
    if value is None or isinstance(value, dict):
        return "is empty" if value is None else "is a mapping"
    return f"{show(value)} is {_TYPES[type(value)]}"


def show(value: Plain) -> str:
    """A value as in the file, on one line and not too long."""
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value[:20])}]"
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = repr(value).replace("inf", ".inf").replace("nan", ".nan") if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
