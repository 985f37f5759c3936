"""Vision transformers with torchvision's state-dict names: each counted block has two residuals.

x ──┬── LN ─ attention ─ DropPath ── r1 ──(+)──┬── LN ─ MLP ─ DropPath ── r2 ──(+)──
    └──────────────────────────────────────┘  └────────────────────────────────┘
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network, Residual
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models.batchnorm import refuse_identity
from pipetrgl.models.stochastic import Dropout, DropPath

WIDTH = 192
"""ViT-Tiny's; ViT-Small has 384, ViT-Base 768."""
FEATURES_OF_A_HEAD = 64
EPS = 1e-6


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """An uncounted patch embedding, the counted encoder layers, and an uncounted last LayerNorm.

    Raises:
        ModelError: patches that do not tile the image, or attention heads that do not share the width.
    """
    channels, height, width_px = input_shape
    width = config.width or WIDTH
    if height % config.patch or width_px % config.patch:
        raise ModelError(f"model.patch: patches of side {config.patch} do not tile images of {height}x{width_px}.")
    num_heads = attention_heads(config, width)
    refuse_identity(impl, "encoder_layer_0")
    num_patches = (height // config.patch) * (width_px // config.patch)
    embed = partial(PatchEmbedding, channels, width, config.patch, num_patches, config.dropout)
    blocks = [BlockSpec("stem", "", embed, counted=False)]
    for index in range(config.depth):
        make = partial(EncoderLayer, width, num_heads, config.dropout, drop_path_rate(config, index))
        blocks.append(BlockSpec(f"encoder_layer_{index}", f"encoder.layers.encoder_layer_{index}.", make))
    blocks.append(BlockSpec("encoder_ln", "encoder.", partial(LastNorm, width), counted=False))
    return Network(f"vit-{config.depth}", tuple(blocks), input_shape, num_classes)


def attention_heads(config: ModelConfig, width: int) -> int:
    """How many share the width.

    Raises:
        ModelError: they cannot do so evenly.
    """
    num_heads = config.num_heads or max(1, width // FEATURES_OF_A_HEAD)
    if width % num_heads:
        raise ModelError(f"model.num_heads: {num_heads} heads cannot share a width of {width} evenly.")
    return num_heads


def drop_path_rate(config: ModelConfig, index: int) -> float:
    """Of layer `index`: on a straight line from 0 at the first layer to `drop_path` at the last."""
    return config.drop_path * index / max(1, config.depth - 1)


class PatchEmbedding(nn.Module):
    """(N, C, H, W) -> (N, 1 + patches, D): class token, patches, and their positions."""

    def __init__(self, in_channels: int, width: int, patch: int, num_patches: int, dropout: float) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.encoder = Positions(1 + num_patches, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> BlockOutput:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.size(0), -1, -1), patches], dim=1)
        return BlockOutput(self.dropout(self.encoder(tokens)))


class Positions(nn.Module):
    """Adds the position table; a module of its own for the sake of torchvision's name, encoder.pos_embedding."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(1, num_tokens, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.pos_embedding


class EncoderLayer(nn.Module):
    """(N, T, D) -> the same; both residual branches end in a linear layer.

    Args:
        causal: a token attends to itself and those before it only, as in a decoder.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, drop_path: float, causal: bool = False) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPS)
        self.self_attention = SelfAttention(width, num_heads, causal)
        self.dropout = Dropout(dropout)
        self.drop_path1 = DropPath(drop_path)
        self.ln_2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), Dropout(dropout), nn.Linear(4 * width, width), Dropout(dropout)
        )
        self.drop_path2 = DropPath(drop_path)

    @property
    def branch_ends(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are the residuals, for the stability guard."""
        return (self.self_attention.out_proj, self.mlp[3])

    def forward(self, x: Tensor) -> BlockOutput:
        r1 = self.drop_path1(self.dropout(self.self_attention(self.ln_1(x))))
        x = x + r1
        r2 = self.drop_path2(self.mlp(self.ln_2(x)))
        return BlockOutput(x + r2, (Residual.of(r1), Residual.of(r2)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with `nn.MultiheadAttention`'s parameters, whose `out_proj` is called as a module.

    `nn.MultiheadAttention` only borrows the weights of its `out_proj`, so no hook there would see the input.
    """

    def __init__(self, width: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return out


class LastNorm(nn.Module):
    """The LayerNorm that closes the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(self.ln(x))
