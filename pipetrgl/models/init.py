"""Start weights of every parameter, drawn from one generator in the order of the module's own parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipetrgl.config.schema import InitConfig

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
POSITION_STD = 0.02
ZEROS = ("bias", "in_proj_bias", "class_token", "cls_token", "dist_token", "reg_token")
POSITIONS = ("pos_embedding", "pos_embed", "relative_position_bias_table")
SCALES = ("layer_scale", "gamma")
"""Of a residual branch, in adopted blocks; they start where the block's builder put them."""


@torch.no_grad()
def initialise(module: nn.Module, config: InitConfig, generator: torch.Generator) -> None:
    """Overwrite every parameter, and reset running statistics.

    Convolution and linear weights follow `config`; biases start at 0, normalisation at 1 and 0, class tokens at 0,
    tables of positions and tokens at N(0, 0.02); scales of residual branches stay as they are.

    Args:
        module: a block or a head on the CPU in float32, so that its weights do not depend on the device.
        config: name and gain.
        generator: of the CPU; consumed.
    """
    for owner_name, owner in module.named_modules():
        if isinstance(owner, (nn.BatchNorm1d, nn.BatchNorm2d)):
            owner.reset_running_stats()
        for name, parameter in owner.named_parameters(recurse=False):
            assert parameter.dtype == torch.float32 and parameter.device.type == "cpu", f"{owner_name}.{name}"
            if isinstance(owner, NORMS):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif isinstance(owner, (nn.Conv2d, nn.Linear)) and name == "weight":
                _draw(parameter, config, generator)
            elif isinstance(owner, nn.Embedding):
                parameter.normal_(std=POSITION_STD, generator=generator)
            elif name == "in_proj_weight":
                # Query, key and value are three linear layers in one tensor, and start as three.
                for projection in parameter.chunk(3):
                    _draw(projection, config, generator)
            elif name in ZEROS:
                parameter.zero_()
            elif name in POSITIONS:
                parameter.normal_(std=POSITION_STD, generator=generator)
            elif name not in SCALES:
                raise AssertionError(f"no start value for '{owner_name}.{name}' of {type(owner).__name__}")


def initialised(owner: nn.Module, name: str) -> bool:
    """Whether `initialise` knows how the parameter `name` of `owner` starts."""
    weights = isinstance(owner, (nn.Conv2d, nn.Linear)) and name == "weight"
    known = (*ZEROS, *POSITIONS, *SCALES, "in_proj_weight")
    return isinstance(owner, NORMS) or weights or name in known


def _draw(weight: Tensor, config: InitConfig, generator: torch.Generator) -> None:
    if config.name == "orthogonal":
        nn.init.orthogonal_(weight, gain=config.gain, generator=generator)
    elif config.name == "kaiming":
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=config.gain, generator=generator)
