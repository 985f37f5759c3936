"""Decoder-only transformers: the layers of our ViT with causal attention, over bytes in place of patches.

bytes (N, T) ── token + position ── layer ── layer ── ..      each head: LayerNorm ── linear ── logits (N, T, 256)
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec, Network
from pipetrgl.config.schema import ModelConfig
from pipetrgl.models.batchnorm import refuse_identity
from pipetrgl.models.stochastic import Dropout
from pipetrgl.models.vit import EncoderLayer, Positions, attention_heads, drop_path_rate

WIDTH = 128


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str) -> Network:
    """The uncounted "stem" looks tokens up; the counted blocks are "layers.0", "layers.1", ...

    Raises:
        ModelError: attention heads that do not share the width.
    """
    (num_tokens,) = input_shape
    width = config.width or WIDTH
    num_heads = attention_heads(config, width)
    refuse_identity(impl, "layers.0")
    embed = partial(TokenEmbedding, num_classes, width, num_tokens, config.dropout)
    blocks = [BlockSpec("stem", "", embed, counted=False)]
    for index in range(config.depth):
        rate = drop_path_rate(config, index)
        make = partial(EncoderLayer, width, num_heads, config.dropout, rate, causal=True)
        blocks.append(BlockSpec(f"layers.{index}", f"layers.{index}.", make))
    return Network(f"gpt-{config.depth}", tuple(blocks), input_shape, num_classes, reads_tokens=True)


class TokenEmbedding(nn.Module):
    """int64 (N, T) -> (N, T, D): a vector of each token, and of its position."""

    def __init__(self, num_classes: int, width: int, num_tokens: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = Positions(num_tokens, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> BlockOutput:
        return BlockOutput(self.dropout(self.positions(self.tokens(x))))
