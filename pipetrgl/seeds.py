"""Every random stream of the project, each a function of the seed and of what it is for.

No stream depends on the number of stages, replicas or workers, on the launcher, or on a resume: start weights come from
(seed, block name), order and augmentation from (seed, epoch, position), dropout from (seed, block, step).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: BLAKE2b of the seed and the purpose's parts.

    >>> derive(0, "weights", "layer1.0") == derive(0, "weights", "layer1.0")
    True
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_stream(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose; the global generator of torch is never used."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def numpy_stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh Philox generator for one purpose; its stream is the same on every platform."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))


NUM_DRAWS = 1024


def jitter_draws(seed: int, stage: int, part: int) -> npt.NDArray[np.float64]:
    """Even draws from -1 .. 1 for micro-batches part * NUM_DRAWS and on: how much of the jitter a stage is slower.

    Emulated stages and the simulator have the same, so a run can be compared with what was predicted for it.
    """
    return numpy_stream(seed, "jitter", stage, part).uniform(-1, 1, NUM_DRAWS)
