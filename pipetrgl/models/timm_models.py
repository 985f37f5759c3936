"""Vision transformers of timm by name, `timm:vit_tiny_patch16_224`, listed as blocks with two residuals each.

x ──┬── LN ─ attention ─ scale ─ DropPath ── r1 ──(+)──┬── LN ─ MLP ─ scale ─ DropPath ── r2 ──(+)──
    └──────────────────────────────────────────────────┘  └──────────────────────────────────────────┘

Only the layers are timm's, and their state-dict names; its classifier is left out. A model whose blocks are of another
kind is refused.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from typing import Any

from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import torchvision_models
from pipetrgl.models.adopted import Adopted, Chain, template
from pipetrgl.models.batchnorm import refuse_identity
from pipetrgl.models.stochastic import DropPath

_AFTER_THE_STEM = ("blocks", "norm", "fc_norm", "head_drop", "head", "head_dist", "attn_pool")


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The blocks of a timm classifier for images of this shape; its start weights are ours.

    Raises:
        ModelError: no such model, one that cannot be listed, images that it cannot read, or timm is missing.
    """
    timm, name = _timm(), config.name.removeprefix("timm:")
    if not timm.is_model(name):
        close = ", ".join(f"'{match}'" for match in difflib.get_close_matches(name, timm.list_models()))
        raise ModelError(f"model.name: timm has no model '{name}'. Nearest: {close or 'none; see timm.list_models()'}.")
    _require_transformer(timm, name)
    channels, *size = input_shape
    try:
        model = timm.create_model(
            name, pretrained=False, in_chans=channels, img_size=tuple(size), drop_path_rate=config.drop_path
        )
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.name: timm cannot build '{name}' for images of {input_shape}: {error}") from error
    refuse_identity(impl, "blocks.0")
    blocks, norm = model.blocks, model.norm
    for part, block in blocks.named_children():
        if type(block).__name__ != "Block":
            kind = type(block).__name__
            raise ModelError(f"model.name: '{name}' cannot be listed: its block 'blocks.{part}' is a {kind}.")
    parts: list[tuple[str, str, nn.Module, bool]] = [("stem", "", Stem(model), False)]
    parts += [(f"blocks.{part}", f"blocks.{part}.", Block(block), True) for part, block in blocks.named_children()]
    parts += [("norm", "", Chain(norm=norm), False)]
    specs = (BlockSpec(part, prefix, template(block, name), counted) for part, prefix, block, counted in parts)
    return Network(name, tuple(specs), input_shape, num_classes)


@functools.cache
def _timm() -> Any:
    torchvision_models.library()  # timm imports it
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ModelError("model.name: 'timm:...' needs the extra: pip install 'pipetrgl[vision]'") from error


def _require_transformer(timm: Any, name: str) -> None:
    """Most of timm's families have blocks of their own; only those of its vision transformers are known here."""
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family not in ("vision_transformer", "deit"):
        raise ModelError(
            f"model.name: '{name}' cannot be listed: the blocks of timm's '{family}' are not known here one by one. "
            "Known: vision_transformer, deit. ResNet, VGG, Swin and ConvNeXt can be had from torchvision."
        )


class Stem(Adopted):
    """(N, C, H, W) -> (N, T, D): patches with positions and class tokens, as the model's own method adds them."""

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        for name in _AFTER_THE_STEM:
            if hasattr(self, name):
                delattr(self, name)
        plain = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
        vars(self).update({name: value for name, value in plain.items() if name not in ("training", "default_cfg")})
        self.add_positions = type(theirs)._pos_embed

    def forward(self, x: Tensor) -> BlockOutput:
        tokens = self.add_positions(self, self.patch_embed(x))
        return BlockOutput(self.norm_pre(self.patch_drop(tokens)))


class Block(Adopted):
    """(N, T, D) -> the same; two residuals, each after DropPath."""

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        self.drop_path1, self.drop_path2 = (
            DropPath(getattr(path, "drop_prob", 0.0)) for path in (theirs.drop_path1, theirs.drop_path2)
        )

    def forward(self, x: Tensor) -> BlockOutput:
        r1 = self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + r1
        r2 = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return BlockOutput(x + r2, (Residual.of(r1), Residual.of(r2)))
