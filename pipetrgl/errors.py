"""Every error that the project raises on purpose, with the exit code its launcher ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PipetrglError(Exception):
    """An error with a message meant for the user; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(PipetrglError):
    """The configuration cannot be run; found before any device is touched."""

    exit_code = 2


class DataError(ConfigError):
    """A data set is missing, truncated or not what it claims to be."""


class ModelError(ConfigError):
    """A model, head or cut that cannot be built as configured."""


class LaunchError(PipetrglError):
    """Workers could not be started, or one of them died."""

    exit_code = 3


class LinkError(PipetrglError):
    """A link between two stages broke, timed out or carried something unexpected."""

    exit_code = 3


class ReplayGapError(LinkError):
    """A replaced stage needs what the stage before no longer keeps: only the whole run can start again."""


class DivergedError(PipetrglError):
    """A loss or an activation is NaN or infinite."""

    exit_code = 4


class Interrupted(PipetrglError):
    """The user, or the scheduler, asked the run to end."""

    exit_code = 130


class StoppedError(Interrupted):
    """The run was asked to end early; it ended well, with a checkpoint, and can go on."""


BY_NAME: dict[str, type[PipetrglError]] = {
    error.__name__: error
    for error in (
        PipetrglError,
        ConfigError,
        DataError,
        ModelError,
        LaunchError,
        LinkError,
        ReplayGapError,
        DivergedError,
        Interrupted,
    )
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest match, then every allowed one.

    >>> nearest("cifar", ["cifar10", "stl10"])
    "Did you mean 'cifar10'? Allowed: cifar10, stl10."
    """
    names: Sequence[str] = sorted(allowed)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{matches[0]}'? " if matches else ""
    return f"{hint}Allowed: {', '.join(names)}."
