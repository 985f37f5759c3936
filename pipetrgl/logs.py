"""Where the library's log lines go; a worker's start with its stage and replica, `s1/4 r0/2 step 1200 | ...`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path


def log_to_stderr() -> None:
    """Send every record of the package to stderr: a worker's log file, torchrun's, or Ray's."""
    logger = _add(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Also append every record of the package to a file, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    logger = _add(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler) -> logging.Logger:
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("pipetrgl")
    logger.addHandler(handler)
    return logger
