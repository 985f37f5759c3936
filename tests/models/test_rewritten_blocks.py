"""Transformer blocks against their formula written out again: loss with the transport cost, and every gradient.

r1 = attention(LN(x)),  r2 = MLP(LN(x + r1)),  loss = CE(linear(mean over tokens)) + (mean r1^2 + mean r2^2) / (2 tau)

of a gpt the attention is causal, and the linear layer answers for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput
from pipetrgl.config.schema import InitConfig, ModelConfig, ObjectiveConfig
from pipetrgl.models import zoo
from pipetrgl.models.init import initialise
from pipetrgl.objective import StageObjective
from pipetrgl.seeds import torch_stream

TAU = 0.3
NUM_CLASSES = 5
Named = Mapping[str, Tensor]


def norm(x: Tensor, p: Named, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(x: Tensor, p: Named, first: str, second: str) -> Tensor:
    h = x @ p[f"{first}.weight"].T + p[f"{first}.bias"]
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return h @ p[f"{second}.weight"].T + p[f"{second}.bias"]


def attention(
    x: Tensor, qkv: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt d + bias) v for each head; (N, T, D), bias (N, heads, T, T)."""
    heads = []
    q, k, v = (x @ qkv[0].T + qkv[1]).chunk(3, dim=-1)
    d = x.shape[-1] // num_heads
    for head in range(num_heads):
        own = slice(head * d, (head + 1) * d)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / d**0.5
        scores = scores if bias is None else scores + bias[:, head]
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[..., own])
    return torch.cat(heads, dim=-1) @ out[0].T + out[1]


def vit(
    x: Tensor, p: Named, num_heads: int, layers: tuple[str, str], bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours and torchvision's, which share their names but for those of the MLP's linear layers."""
    qkv = p["self_attention.in_proj_weight"], p["self_attention.in_proj_bias"]
    out = p["self_attention.out_proj.weight"], p["self_attention.out_proj.bias"]
    r1 = attention(norm(x, p, "ln_1", 1e-6), qkv, out, num_heads, bias)
    r2 = mlp(norm(x + r1, p, "ln_2", 1e-6), p, *layers)
    return x + r1 + r2, r1, r2


def gpt(x: Tensor, p: Named, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ViT's layer, where row t of the scores is -inf behind column t."""
    size = x.shape[1]
    later = torch.tensor([[-torch.inf if j > i else 0.0 for j in range(size)] for i in range(size)])
    return vit(x, p, num_heads, ("mlp.0", "mlp.3"), later.expand(1, num_heads, size, size))


def timm_vit(x: Tensor, p: Named, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv, out = (p["attn.qkv.weight"], p["attn.qkv.bias"]), (p["attn.proj.weight"], p["attn.proj.bias"])
    r1 = attention(norm(x, p, "norm1", 1e-6), qkv, out, num_heads)
    r2 = mlp(norm(x + r1, p, "norm2", 1e-6), p, "mlp.fc1", "mlp.fc2")
    return x + r1 + r2, r1, r2


def swin(x: Tensor, p: Named, num_heads: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C, H, W) whose sides are twice the window of 7: four windows, moved by `shift` pixels before they are cut.

    Behind the move a window holds pixels from opposite edges of the map, which must not see each other.
    """
    x = x.permute(0, 2, 3, 1)
    side, window = x.shape[1], 7
    assert side == 2 * window
    table = p["attn.relative_position_bias_table"]
    at = torch.arange(window)
    rows, columns = at.repeat_interleave(window), at.repeat(window)
    offsets = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
    position = table[offsets].permute(2, 0, 1)  # (heads, 49, 49)

    normed = norm(x, p, "norm1", 1e-5)
    r1 = torch.zeros_like(x)
    moved = [(i + shift) % side for i in range(side)]
    qkv, out = (p["attn.qkv.weight"], p["attn.qkv.bias"]), (p["attn.proj.weight"], p["attn.proj.bias"])
    for top in (0, window):
        for left in (0, window):
            pixels = [(moved[top + i], moved[left + j]) for i in range(window) for j in range(window)]
            index = torch.tensor([i * side + j for i, j in pixels])
            # pixels that the move has carried over an edge of the map
            carried = [(i < shift and top > 0, j < shift and left > 0) for i, j in pixels]
            apart = torch.tensor([[-100.0 if one != other else 0.0 for other in carried] for one in carried])
            tokens = normed.flatten(1, 2)[:, index]
            moved_by = attention(tokens, qkv, out, num_heads, (position + apart)[None])
            r1 = r1.flatten(1, 2).index_copy(1, index, moved_by).view_as(x)
    r2 = mlp(norm(x + r1, p, "norm2", 1e-5), p, "mlp.0", "mlp.3")
    return (x + r1 + r2).permute(0, 3, 1, 2), r1, r2


def block_of(options: dict[str, object], side: int, name: str) -> nn.Module:
    """One block in float64, without stochastic depth, its parameters away from where they start."""
    sample = (5,) if options["name"] == "gpt" else (3, side, side)
    network = zoo.build(ModelConfig.model_validate(options), sample, NUM_CLASSES)
    block = next(spec for spec in network.blocks if spec.name == name).build().train()
    initialise(block, InitConfig(gain=1.0), torch_stream(0, "block"))
    for module in block.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return block.double()


Rewritten = Callable[[Tensor, Named], tuple[Tensor, Tensor, Tensor]]
CASES: dict[str, tuple[dict[str, object], int, str, tuple[int, ...], Rewritten]] = {
    "our vit": (
        {"name": "vit", "depth": 2, "width": 32, "num_heads": 4, "patch": 8}, 16, "encoder_layer_1", (5, 32),
        lambda x, p: vit(x, p, 4, ("mlp.0", "mlp.3")),
    ),
    "our gpt": (
        {"name": "gpt", "depth": 2, "width": 32, "num_heads": 4}, 5, "layers.1", (5, 32), lambda x, p: gpt(x, p, 4),
    ),
    "torchvision's vit": (
        {"name": "torchvision:vit_b_16"}, 32, "encoder_layer_1", (5, 768),
        lambda x, p: vit(x, p, 12, ("mlp.0", "mlp.3")),
    ),
    "timm's vit": (
        {"name": "timm:vit_tiny_patch16_224"}, 32, "blocks.1", (5, 192), lambda x, p: timm_vit(x, p, 3),
    ),
    "swin": (
        {"name": "torchvision:swin_t"}, 56, "features.1.0", (96, 14, 14), lambda x, p: swin(x, p, 3, shift=0),
    ),
    "swin, shifted": (
        {"name": "torchvision:swin_t"}, 56, "features.1.1", (96, 14, 14), lambda x, p: swin(x, p, 3, shift=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula_written_out_again(case: str) -> None:
    options, side, name, shape, rewritten = CASES[case]
    block = block_of(options, side, name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    per_token = case == "our gpt"
    target = torch.arange(15).view(3, 5) * 7 % 5 if per_token else torch.tensor([0, 3, 1])
    width = shape[0] if len(shape) == 3 else shape[1]
    head = torch.randn(NUM_CLASSES, width, generator=generator, dtype=torch.float64)

    def logits(y: Tensor) -> Tensor:
        return (y if per_token else y.mean((2, 3)) if y.ndim == 4 else y.mean(1)) @ head.T

    parameters = dict(block.named_parameters())
    objective = StageObjective(ObjectiveConfig(), TAU, torch.device("cpu"))
    output: BlockOutput = block(x)
    cost = objective.measure(x, output)
    assert cost is not None
    loss = objective.local_loss(logits(output.activation), target, [cost]).total
    found = torch.autograd.grad(loss, [x, *parameters.values()])

    y, r1, r2 = rewritten(x, parameters)
    # torch's own form for several targets a row has the classes on the second axis
    expected = F.cross_entropy(logits(y).movedim(-1, 1), target) + (r1.square().mean() + r2.square().mean()) / (2 * TAU)
    assert min(r1.detach().std(), r2.detach().std()) > 0.1
    gradients = torch.autograd.grad(expected, [x, *parameters.values()])

    # float64 against sums of at most some thousand terms in another order
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for parameter, one, other in zip(["x", *parameters], found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()) + 1e-15, msg=parameter)
