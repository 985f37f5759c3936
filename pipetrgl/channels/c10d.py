"""The pieces of torch.distributed that links stand on: stores, and process groups of two workers.

A group is made directly over a store, not through `init_process_group`: there is no world-wide group that one dead
worker could take down. Only torch's pipeline schedules, where one dead worker ends them all anyway, need that group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Public at run time, but not exported by torch's annotations.
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]
HashStore: Any = dist.HashStore  # type: ignore[attr-defined]
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
Store = Any
rendezvous: Any = dist.rendezvous  # type: ignore[attr-defined]

SENDER, RECEIVER = 0, 1


def store_address(store: Store) -> str:
    """Where a store's clients find it, for messages."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return f"{store.host}:{store.port}"


def gloo_pair(store: Store, side: int, address: str, timeout_s: float) -> ProcessGroup:
    """A gloo group of two; blocks until the other side comes.

    Args:
        store: with a prefix that only these two use.
        side: SENDER or RECEIVER, the rank in the group.
        address: of this machine, as the other side reaches it.
        timeout_s: for the connection; later waits state their own.
    """
    return gloo_group(store, side, 2, address, timeout_s)


def gloo_group(store: Store, rank: int, size: int, address: str, timeout_s: float) -> ProcessGroup:
    """A gloo group of `size` workers, each connected with every other; else as `gloo_pair`."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    return cast(ProcessGroup, gloo(store, rank, size, options))


def default_group(store: Store, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    """Torch's default group, gloo; blocks until all have come. `timeout_s` is for each message.

    Gloo takes the address that this machine's name stands for, or that of $GLOO_SOCKET_IFNAME.
    """
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    return cast(ProcessGroup, dist.group.WORLD)


def nccl_pair(store: Store, side: int, device: torch.device) -> ProcessGroup:
    """An NCCL group of two."""
    return nccl_group(store, side, 2, device)


def nccl_group(store: Store, rank: int, size: int, device: torch.device) -> ProcessGroup:
    """An NCCL group, connected now: a lazy one would connect inside the first send and hold up the stream."""
    nccl: Any = dist.ProcessGroupNCCL  # absent from CPU builds of torch
    group = nccl(store, rank, size, nccl.Options())
    group.eager_connect_single_device(device)
    return cast(ProcessGroup, group)
