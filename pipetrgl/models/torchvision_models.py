"""Classifiers of torchvision by name, `torchvision:swin_t`, listed as blocks whose residual branches are tapped.

torchvision's model ─▶ stem │ block │ block │ merge │ block │ ... │ last norm     (its classifier is left out)

Only their layers are torchvision's: state-dict names too. Each kind of block has its forward written out below, so that
r is at hand before the addition; a model with any other kind of block is refused.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError, nearest
from pipetrgl.models.adopted import Adopted, Chain, template
from pipetrgl.models.batchnorm import BatchNorm2d, close_branch, refuse_identity
from pipetrgl.models.stochastic import DropPath

_MISSING_OPERATORS = ("nms", "qnms")


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The blocks of a torchvision classifier; its start weights are ours, its rates of stochastic depth its own.

    Raises:
        ModelError: no such model, one that cannot be listed, images that it cannot read, or torchvision is missing.
    """
    name = config.name.removeprefix("torchvision:")
    models = library()
    allowed = models.list_models(module=models)
    if name not in allowed:
        raise ModelError(f"model.name: torchvision has no classifier '{name}'. {nearest(name, allowed)}")
    if input_shape[0] != 3:
        raise ModelError(f"model.name: torchvision's models read RGB images, not {input_shape[0]} channels.")
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        if input_shape[1] != input_shape[2]:
            raise ModelError(f"model.name: '{name}' reads square images, not {input_shape[1]}x{input_shape[2]}.")
        options["image_size"] = input_shape[1]
    try:
        model = models.get_model(name, weights=None, **options)
    except AssertionError as error:
        raise ModelError(f"model.name: '{name}' cannot read images of {input_shape[1:]}: {error}") from error
    specs = []
    for part, prefix, block, counted in _list(name, model, identity=impl != "autograd"):
        if counted and not isinstance(block, (BasicBlock, Bottleneck)):
            refuse_identity(impl, part)
        specs.append(BlockSpec(part, prefix, template(block, name), counted))
    return Network(name, tuple(specs), input_shape, num_classes)


@functools.cache
def library() -> Any:
    """`torchvision.models`, also where torchvision's operators do not fit this torch.

    A torchvision built for CUDA cannot load its operators beside a CPU torch, and then wants the schema of two of them
    at import, though no classifier uses them.
    """
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise ModelError("model.name: 'torchvision:...' needs the extra: pip install 'pipetrgl[vision]'") from error
    except RuntimeError:
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
    _schemas()
    return importlib.import_module("torchvision.models")


@functools.cache
def _schemas() -> torch.library.Library:
    """Of the missing operators; they last as long as this object."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in _MISSING_OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


Part = tuple[str, str, nn.Module, bool]
"""Name, prefix, module, counted."""


def _list(name: str, model: Any, identity: bool) -> Iterator[Part]:
    """The parts of a model in forward order."""
    lister = _LISTERS.get(type(model).__name__)
    if lister is None:
        kinds = ", ".join(_LISTERS)
        raise ModelError(
            f"model.name: '{name}' cannot be listed: it is a {type(model).__name__}, whose forward is not known here "
            f"block by block. Known: {kinds}."
        )
    yield from lister(name, model, identity)


def _resnet(name: str, model: Any, identity: bool) -> Iterator[Part]:
    yield "stem", "", Chain(conv1=model.conv1, bn1=model.bn1, relu=model.relu, maxpool=model.maxpool), False
    kinds = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}
    for group in range(1, 5):
        for index, block in enumerate(getattr(model, f"layer{group}")):
            part = f"layer{group}.{index}"
            yield part, f"{part}.", kinds[type(block).__name__](block, identity), True


def _vgg(name: str, model: Any, identity: bool) -> Iterator[Part]:
    """One counted block for each convolution; a max-pool opens the next one, and the last pool stands alone."""
    layers = list(model.features.named_children())
    starts = [at for at, (_, layer) in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    opens = [at - (at > 0 and isinstance(layers[at - 1][1], nn.MaxPool2d)) for at in starts]
    ends = [*opens[1:], len(layers) - 1]
    for start, first, end in zip(starts, opens, ends, strict=True):
        yield f"features.{layers[start][0]}", "features.", VggLayer(dict(layers[first:end])), True
    position, pool = layers[-1]
    yield f"features.{position}", "features.", Chain(**{position: pool}), False


def _swin(name: str, model: Any, identity: bool) -> Iterator[Part]:
    for position, layer in model.features.named_children():
        part = f"features.{position}"
        if position == "0":  # convolution, permutation to channels last, LayerNorm
            yield part, f"{part}.", SwinStem(layer), False
        elif isinstance(layer, nn.Sequential):
            for index, block in layer.named_children():
                kind = type(block).__name__
                if kind != "SwinTransformerBlock":
                    raise ModelError(f"model.name: '{name}' cannot be listed: its block '{part}.{index}' is a {kind}.")
                yield f"{part}.{index}", f"{part}.{index}.", SwinBlock(block), True
        else:
            yield part, "features.", ChannelsLast(**{position: layer}), False  # merges patches
    yield "norm", "", ChannelsLast(norm=model.norm), False


def _vit(name: str, model: Any, identity: bool) -> Iterator[Part]:
    layers, last = model.encoder.layers, model.encoder.ln
    model.heads = nn.Identity()
    model.encoder.layers, model.encoder.ln = nn.Identity(), nn.Identity()
    yield "stem", "", VitStem(model), False
    for part, block in layers.named_children():
        yield part, f"encoder.layers.{part}.", VitBlock(block), True
    yield "encoder_ln", "encoder.", Chain(ln=last), False


def _convnext(name: str, model: Any, identity: bool) -> Iterator[Part]:
    for position, layer in model.features.named_children():
        part = f"features.{position}"
        if type(layer[0]).__name__ == "CNBlock":
            for index, block in layer.named_children():
                yield f"{part}.{index}", f"{part}.{index}.", ConvNextBlock(block), True
        else:
            yield part, f"{part}.", Chain(**dict(layer.named_children())), False


_LISTERS: dict[str, Callable[[str, Any, bool], Iterator[Part]]] = {
    "ResNet": _resnet,
    "VGG": _vgg,
    "SwinTransformer": _swin,
    "VisionTransformer": _vit,
    "ConvNeXt": _convnext,
}


class _ResNetBlock(Adopted):
    """Its last BatchNorm is ours, which knows the mean square of its output."""

    def __init__(self, theirs: Any, identity: bool, last: str) -> None:
        super().__init__(theirs)
        norm = getattr(theirs, last)
        setattr(self, last, BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum))
        self.identity = identity

    def _close(self, x: Tensor, norm: BatchNorm2d, z: Tensor) -> BlockOutput:
        r, residual = close_branch(norm, z, self.identity)
        shortcut = getattr(self, "downsample", None)
        # the sum is a new tensor, so ReLU may overwrite it; r itself may be kept for the cost
        return BlockOutput(torch.relu_(r + (x if shortcut is None else shortcut(x))), (residual,))


class BasicBlock(_ResNetBlock):
    """Two 3x3 convolutions."""

    def __init__(self, theirs: Any, identity: bool) -> None:
        super().__init__(theirs, identity, "bn2")

    def forward(self, x: Tensor) -> BlockOutput:
        h = torch.relu_(self.bn1(self.conv1(x)))
        return self._close(x, self.bn2, self.conv2(h))


class Bottleneck(_ResNetBlock):
    """1x1, 3x3 and 1x1 convolutions."""

    def __init__(self, theirs: Any, identity: bool) -> None:
        super().__init__(theirs, identity, "bn3")

    def forward(self, x: Tensor) -> BlockOutput:
        h = torch.relu_(self.bn1(self.conv1(x)))
        h = torch.relu_(self.bn2(self.conv2(h)))
        return self._close(x, self.bn3, self.conv3(h))


class VggLayer(nn.Module):
    """[max-pool,] convolution, [BatchNorm,] ReLU; the residual is T(x) - x, x after the pool, where channels match."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> BlockOutput:
        layers = list(self.children())
        if isinstance(layers[0], nn.MaxPool2d):
            x = layers.pop(0)(x)
        y = x
        for layer in layers:
            y = layer(y)
        return BlockOutput(y, (Residual.of(y - x),) if y.shape == x.shape else ())


class ChannelsLast(nn.Module):
    """Layers without a residual that work on (N, H, W, C), between blocks that hand on (N, C, H, W)."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> BlockOutput:
        x = x.permute(0, 2, 3, 1)
        for layer in self.children():
            x = layer(x)
        return BlockOutput(x.permute(0, 3, 1, 2))


class SwinStem(Adopted):
    """(N, 3, H, W) -> (N, C, H / 4, W / 4)."""

    def forward(self, x: Tensor) -> BlockOutput:
        for layer in self.children():
            x = layer(x)
        return BlockOutput(x.permute(0, 3, 1, 2))


class SwinBlock(Adopted):
    """(N, C, H, W) -> the same; inside, channels come last, and both residuals are (N, H, W, C), after DropPath.

    x ──┬── LN ─ window attention ─ DropPath ── r1 ──(+)──┬── LN ─ MLP ─ DropPath ── r2 ──(+)──
        └─────────────────────────────────────────────┘  └────────────────────────────────┘
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        rate = theirs.stochastic_depth.p
        del self.stochastic_depth
        self.drop_path1, self.drop_path2 = DropPath(rate), DropPath(rate)

    def forward(self, x: Tensor) -> BlockOutput:
        x = x.permute(0, 2, 3, 1)
        r1 = self.drop_path1(self.attn(self.norm1(x)))
        x = x + r1
        r2 = self.drop_path2(self.mlp(self.norm2(x)))
        return BlockOutput((x + r2).permute(0, 3, 1, 2), (Residual.of(r1), Residual.of(r2)))


class VitStem(Adopted):
    """(N, 3, H, W) -> (N, 1 + patches, D): patches, class token, positions."""

    def forward(self, x: Tensor) -> BlockOutput:
        x = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1)
        return BlockOutput(self.encoder(tokens))


class VitBlock(Adopted):
    """(N, T, D) -> the same: attention and MLP, each a residual after its dropout."""

    def forward(self, x: Tensor) -> BlockOutput:
        normed = self.ln_1(x)
        r1 = self.dropout(self.self_attention(normed, normed, normed, need_weights=False)[0])
        x = r1 + x
        r2 = self.mlp(self.ln_2(x))
        return BlockOutput(x + r2, (Residual.of(r1), Residual.of(r2)))


class ConvNextBlock(Adopted):
    """(N, C, H, W) -> the same: depthwise convolution and MLP, scaled, as one residual after DropPath."""

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        self.stochastic_depth = DropPath(theirs.stochastic_depth.p)

    def forward(self, x: Tensor) -> BlockOutput:
        r = self.stochastic_depth(self.layer_scale * self.block(x))
        # in one memory layout, whatever cut comes next: a convolution may round differently in another
        return BlockOutput((r + x).contiguous(), (Residual.of(r),))
