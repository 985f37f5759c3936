"""Memory of a worker process: keeping freed memory for the next step, and the peak of what it held."""

from __future__ import annotations

import ctypes
import resource
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1
_PORTION_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process's allocator keep what training frees, as the CUDA allocator does, instead of giving it back.

    A step frees and takes the same activations again. By default glibc maps each large one afresh and the kernel zeroes
    its pages: 20,000 page faults a step of benchmarks/two_workers.yaml, and about 15 % of the throughput
    (benchmarks/allocator.txt).

    Returns:
        Whether the platform's allocator can do so (glibc's can); where it cannot, nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _PORTION_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)


def peak_rss_bytes() -> int:
    """The largest resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
