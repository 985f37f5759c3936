"""Blocks adopted from another library's model: its layers under their own names, our forward and our dropout."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput
from pipetrgl.errors import ModelError
from pipetrgl.models.init import SCALES, initialised
from pipetrgl.models.stochastic import Dropout


class Adopted(nn.Module):
    """Takes over the layers and parameters of `theirs`, so that state-dict names stay; subclasses write the forward.

    Every `nn.Dropout` becomes our `Dropout`, whose masks belong to the rows of a step.
    """

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        for name, child in theirs.named_children():
            self.add_module(name, _with_our_dropout(child))
        for name, parameter in theirs.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in theirs.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def __getattr__(self, name: str) -> Any:
        """A layer, parameter or buffer of theirs, whose type is not known here."""
        return super().__getattr__(name)


class Chain(nn.Module):
    """Layers one after another under the names given, without a residual."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, _with_our_dropout(layer))

    def forward(self, x: Tensor) -> BlockOutput:
        for layer in self.children():
            x = layer(x)
        return BlockOutput(x)


def template(block: nn.Module, model: str) -> Callable[[], nn.Module]:
    """A builder of copies of `block`, which itself gives up the memory of all parameters that will be drawn.

    Raises:
        ModelError: a parameter for which there is no rule how it starts.
    """
    for owner_name, owner in block.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not initialised(owner, name):
                raise ModelError(
                    f"model.name: '{model}' cannot be listed: no start value is known for its parameter "
                    f"'{owner_name}.{name}' of a {type(owner).__name__}."
                )
            if name not in SCALES:
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta")))
    return functools.partial(_copy_of, block)


def _copy_of(block: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(block)
    device = torch.get_default_device()
    for owner in fresh.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            kept = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.to(device)
            setattr(owner, name, nn.Parameter(kept))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))
    return fresh


def _with_our_dropout(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Dropout):
        return Dropout(module.p)
    for name, child in list(module.named_children()):
        setattr(module, name, _with_our_dropout(child))
    return module
