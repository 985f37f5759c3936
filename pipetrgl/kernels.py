"""How the blocks of a stage are run: as they are, compiled, in channels_last, or twice so that less is kept.

forward    x ─▶ block ─▶ ...      recompute keeps x alone of each block
backward   x ─▶ block ─▶ its backward pass, one block after another
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipetrgl.blocks import BlockOutput
from pipetrgl.config.schema import TrainConfig
from pipetrgl.errors import LaunchError

BlockCall = Callable[[Tensor], BlockOutput]

_MAX_VARIANTS = 256
"""Compiled variants of one forward method: every kind of block times every number of rows."""


def lay_out(config: TrainConfig, modules: Sequence[nn.Module]) -> None:
    """Bring 4-d parameters into channels_last, if so configured; before an optimizer takes them."""
    if config.channels_last:
        for module in modules:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def calls(config: TrainConfig, blocks: Sequence[nn.Module], device: torch.device) -> tuple[BlockCall, ...]:
    """How each block is called; the blocks themselves, and so their state-dict names, stay what they are.

    Raises:
        LaunchError: torch.compile does not run here.
    """
    chain: list[BlockCall] = list(blocks)
    if config.compile:
        require_compiler(device)
        chain = [Compiled(block) for block in blocks]
    if config.recompute:
        chain = [Recomputed(block, call) for block, call in zip(blocks, chain, strict=True)]
    if config.channels_last:
        chain[0] = ChannelsLast(chain[0])
    return tuple(chain)


@final
class ChannelsLast:
    """The first block of a stage, which links reach in the usual format: they send dense (N, C, H, W)."""

    def __init__(self, call: BlockCall) -> None:
        self._call = call

    def __call__(self, x: Tensor) -> BlockOutput:
        # Always a copy: for maps of one pixel several strides mean the same, and kernels differ by them.
        return self._call(x.clone(memory_format=torch.channels_last) if x.ndim == 4 else x)


@final
class Compiled:
    """A block through torch.compile while it trains; evaluations run it as it is.

    Every number of rows is compiled by itself: with symbolic sizes, what a block is compiled to would depend on the
    blocks that this process has compiled before, and so on the cuts and the launcher.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        for layer in block.modules():
            if hasattr(layer, "reseed"):  # its seed is a new number in every step, and each would be compiled anew
                layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[no-untyped-call]
        self._compiled: BlockCall = _compile(block)

    def __call__(self, x: Tensor) -> BlockOutput:
        # Compiled code takes no notice of hooks that come and go, such as the stability guard's in the first step.
        watched = any(layer._forward_pre_hooks for layer in self._block.modules())
        call = self._compiled if torch.is_grad_enabled() and not watched else self._block
        output: BlockOutput = call(x)
        return output


@final
class Recomputed:
    """A block of which the forward pass keeps the input alone; the backward pass runs it once more.

    Its dropout is seeded by the step, so it draws the same masks; its buffers, BatchNorm's running statistics, are set
    back to what they were, so that a batch counts once.
    """

    def __init__(self, block: nn.Module, call: BlockCall) -> None:
        self._block = block
        self._call = call

    def __call__(self, x: Tensor) -> BlockOutput:
        if not torch.is_grad_enabled():
            return self._call(x)
        output: BlockOutput = checkpoint(
            self._call, x, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
        )
        return output

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _unchanged(list(self._block.buffers()))


@contextlib.contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def require_compiler(device: torch.device) -> None:
    """Compile something small and run it.

    Raises:
        LaunchError: that fails, for there is no C++ compiler or no Triton, or this torch is too old.
    """
    try:
        _compile(nn.Softplus())(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler's stack raises, it means one thing to the user
        first = str(error).strip().partition("\n")[0]
        raise LaunchError(
            f"train.compile: torch.compile does not run here ({type(error).__name__}: {first}); it needs a C++ "
            "compiler, on a GPU also Triton; or use train.compile=false"
        ) from error


def _compile(module: nn.Module) -> Any:
    # torch's annotations lack `recompile_limit`
    return torch.compile(module, dynamic=False, recompile_limit=_MAX_VARIANTS)  # type: ignore[call-overload]
