"""What autograd keeps of a forward pass for its backward pass, counted exactly through saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import final

import torch
from torch import Tensor


@final
class SavedBytes:
    """A context that counts the storages which autograd saves, whole and each once, wherever views of it appear.

    x ── conv ── BN ── ReLU ── conv ── ...      saved: x, conv's output, BN's mean and 1 / std, ReLU's output

    A ReLU in place and the convolution after it save one and the same storage. The storages of `excluded` do not count:
    parameters, buffers and the input, which are there anyway. Gradients and what an operator needs only while it runs
    are never saved.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        # the tensors themselves, so that nobody's address is reused while it is counted
        self._excluded = list(excluded)
        self._seen = {_identity(tensor) for tensor in self._excluded}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._kept: list[Tensor] = []
        self.total = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._kept.clear()
        self._excluded.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self._seen:
            self._seen.add(_identity(tensor))
            self._kept.append(tensor.detach())
            self.total += tensor.untyped_storage().nbytes()
        # not the tensor itself: an operator that saves its own output would then hold its own graph, and never be freed
        return tensor.detach()


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
