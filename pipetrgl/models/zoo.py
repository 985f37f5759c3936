"""The families of networks by name, with what can be known of a network before it is built."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipetrgl.blocks import BlockOutput, BlockSpec, Network
from pipetrgl.config.schema import ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import gpt, mlp, resnet, resnet_preact, timm_models, torchvision_models, vgg, vit

Builder = Callable[[ModelConfig, tuple[int, ...], int, str], Network]

FAMILIES: dict[str, tuple[Builder, frozenset[str]]] = {
    "resnet": (resnet.build, frozenset({"stem", "width"})),
    "resnet_preact": (resnet_preact.build, frozenset({"width"})),
    "vgg": (vgg.build, frozenset({"width", "batch_norm"})),
    "mlp": (mlp.build, frozenset({"width", "batch_norm", "dropout"})),
    "vit": (vit.build, frozenset({"width", "patch", "num_heads", "dropout", "drop_path"})),
    "gpt": (gpt.build, frozenset({"width", "num_heads", "dropout", "drop_path"})),
}
"""Each family's builder, and those of the options below that it uses."""

LIBRARIES: dict[str, tuple[Builder, frozenset[str]]] = {
    "torchvision": (torchvision_models.build, frozenset()),
    "timm": (timm_models.build, frozenset({"drop_path"})),
}
"""The same for other libraries' models, `model.name: library:model`."""

OPTIONS = ("stem", "width", "batch_norm", "patch", "num_heads", "dropout", "drop_path")


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, impl: str = "auto") -> Network:
    """The network of a configuration, as the list of its blocks; nothing is allocated yet.

    Args:
        config: family and size.
        input_shape: of one sample, (C, H, W), or (T,) of a gpt.
        num_classes: outputs of every auxiliary head.
        impl: `TransportConfig.impl`; "autograd" keeps every residual, the others use the BatchNorm identity where a
            branch ends in BatchNorm.
    Raises:
        ModelError: an option that the family does not use, a size it does not have, or impl "batchnorm" for a
            network with a branch that does not end in BatchNorm.
    """
    assert impl in ("auto", "autograd", "batchnorm"), impl
    library, _, theirs = config.name.partition(":")
    make, used = LIBRARIES[library] if theirs else FAMILIES[config.name]
    for option in (*OPTIONS, "depth") if theirs else OPTIONS:
        if option not in used and getattr(config, option) != ModelConfig.model_fields[option].default:
            raise ModelError(f"model.{option}: has no effect on a {config.name}; remove it.")
    if config.name != "mlp" and len(input_shape) != (1 if config.name == "gpt" else 3):
        reads = "rows of text (T,)" if config.name == "gpt" else "images (C, H, W)"
        raise ModelError(f"model.name: a {config.name} reads {reads}, not samples of shape {input_shape}.")
    return make(config, input_shape, num_classes, impl)


def output_shapes(network: Network) -> tuple[tuple[int, ...], ...]:
    """Shape of every block's activation for one sample, found on the meta device: no memory, no arithmetic.

    Raises:
        ModelError: a block cannot work on what reaches it, for the input is too small.
    """
    x = torch.empty(2, *network.input_shape, dtype=network.input_dtype, device="meta")
    shapes: list[tuple[int, ...]] = []
    for spec in network.blocks:
        try:
            output: BlockOutput = _on_meta(spec).eval()(x)
        except RuntimeError as error:
            raise ModelError(
                f"{network.name}: block '{spec.name}' cannot work on an activation of shape {tuple(x.shape[1:])}; "
                f"input images of shape {network.input_shape} are too small for this network ({error})."
            ) from error
        x = output.activation
        shapes.append(tuple(x.shape[1:]))
    return tuple(shapes)


def num_parameters(network: Network) -> tuple[int, ...]:
    """Trainable parameters of every block, without any head."""
    return tuple(sum(p.numel() for p in _on_meta(spec).parameters()) for spec in network.blocks)


def _on_meta(spec: BlockSpec) -> torch.nn.Module:
    with torch.device("meta"), torch.no_grad():
        return spec.build()
