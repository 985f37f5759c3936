"""Where the library's log lines go; a worker's start with its stage and replica, `s1/4 r0/2 step 1200 | ...`."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> logging.Handler:
    """Send every record of the package to stderr: a worker's log file, or torchrun's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("pipetrgl")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return handler
