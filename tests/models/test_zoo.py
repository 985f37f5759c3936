"""What every family of networks promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.blocks import Network
from pipetrgl.config.schema import HeadConfig, InitConfig, ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import heads, zoo
from pipetrgl.models.init import initialise
from pipetrgl.models.stochastic import reseed
from pipetrgl.seeds import torch_stream

SMALL: dict[str, dict[str, object]] = {
    "cifar resnet": {"depth": 14, "width": 4},
    "basic resnet": {"depth": 18, "stem": "tiny_imagenet", "width": 4},
    "bottleneck resnet": {"depth": 50, "stem": "imagenet", "width": 4},
    "pre-activation resnet": {"name": "resnet_preact", "depth": 2, "width": 4},
    "vgg": {"name": "vgg", "depth": 13, "width": 4},
    "vgg without BatchNorm": {"name": "vgg", "depth": 11, "width": 4, "batch_norm": False},
    "mlp": {"name": "mlp", "depth": 3, "width": 16, "dropout": 0.1},
    "mlp without BatchNorm": {"name": "mlp", "depth": 3, "width": 16, "batch_norm": False},
    "vit": {"name": "vit", "depth": 2, "width": 16, "dropout": 0.1, "drop_path": 0.1},
}
EVERY_FAMILY = pytest.mark.parametrize("options", SMALL.values(), ids=SMALL.keys())
SHAPE = (3, 32, 32)

TORCHVISION = json.loads(Path(__file__).with_name("torchvision_names.json").read_text())
"""State-dict names and shapes of torchvision 0.28's backbones, without their classifiers."""
TORCHVISION_CONFIGS: dict[str, dict[str, object]] = {
    "resnet18": {"depth": 18, "stem": "imagenet"},
    "resnet50": {"depth": 50, "stem": "imagenet"},
    "vgg11": {"name": "vgg", "depth": 11, "batch_norm": False},
    "vgg19_bn": {"name": "vgg", "depth": 19},
    "vit_b_16": {"name": "vit", "depth": 12, "width": 768, "patch": 16},
}


def network_of(options: dict[str, object], impl: str = "auto") -> Network:
    return zoo.build(ModelConfig.model_validate(options), SHAPE, 10, impl)


def built(network: Network, seed: int = 0) -> list[nn.Module]:
    blocks = []
    for spec in network.blocks:
        block = spec.build()
        initialise(block, InitConfig(gain=0.5), torch_stream(seed, "weights", spec.name))
        reseed(block, seed, row_start=0, batch_rows=4)
        blocks.append(block)
    return blocks


def images() -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TORCHVISION_CONFIGS)
def test_state_dict_names_and_shapes_are_torchvisions(name: str) -> None:
    network = zoo.build(ModelConfig.model_validate(TORCHVISION_CONFIGS[name]), (3, 224, 224), 1000)
    ours: dict[str, list[int]] = {}
    with torch.device("meta"):
        for spec in network.blocks:
            state = spec.build().state_dict()
            ours |= {spec.prefix + key: list(value.shape) for key, value in state.items()}
    assert ours == TORCHVISION[name]


@EVERY_FAMILY
@pytest.mark.parametrize("impl", ["auto", "autograd"])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_never_alters_its_input(options: dict[str, object], impl: str, training: bool) -> None:
    network, x = network_of(options, impl), images()
    for spec, block in zip(network.blocks, built(network), strict=True):
        x.requires_grad_(training)
        before, version = x.detach().clone(), x._version
        output = block.train(training)(x)
        if training:
            output.activation.square().sum().backward()
        assert torch.equal(x.detach(), before) and x._version == version, spec.name
        x = output.activation.detach()


@EVERY_FAMILY
def test_predicted_shapes_and_sizes_are_the_real_ones(options: dict[str, object]) -> None:
    network, x = network_of(options), images()
    blocks = built(network)
    shapes = []
    for block in blocks:
        x = block(x).activation
        shapes.append(tuple(x.shape[1:]))
    assert zoo.output_shapes(network) == tuple(shapes)
    assert zoo.num_parameters(network) == tuple(sum(p.numel() for p in block.parameters()) for block in blocks)


@EVERY_FAMILY
@pytest.mark.parametrize("init", ["orthogonal", "kaiming", "trunc_normal"])
def test_every_parameter_is_initialised_from_the_stream_alone(options: dict[str, object], init: str) -> None:
    config = InitConfig.model_validate({"name": init})
    for spec in network_of(options).blocks:
        states = []
        for poison in (float("nan"), 3.0):
            block = spec.build()
            for parameter in block.parameters():
                nn.init.constant_(parameter, poison)
            initialise(block, config, torch_stream(0, "weights", spec.name))
            states.append(block.state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), spec.name


@EVERY_FAMILY
def test_two_builds_under_different_global_seeds_are_equal(options: dict[str, object]) -> None:
    runs = []
    with torch.random.fork_rng():
        for global_seed in (1, 2):
            torch.manual_seed(global_seed)
            network, x = network_of(options), images()
            for block in built(network):
                x = block(x).activation
            runs.append(x)
    assert torch.equal(runs[0], runs[1])


@EVERY_FAMILY
def test_the_global_generator_is_not_read_while_training(options: dict[str, object]) -> None:
    network, x = network_of(options), images()
    blocks = built(network)
    before = torch.get_rng_state()
    for block in blocks:
        x = block(x).activation
    assert torch.equal(torch.get_rng_state(), before)


@EVERY_FAMILY
def test_residuals_have_as_many_features_as_they_say(options: dict[str, object]) -> None:
    network, x = network_of(options, "autograd"), images()
    for block in built(network):
        output = block(x)
        x = output.activation
        for residual in output.residuals:
            assert residual.mean_square is None
            assert residual.value.numel() == 4 * residual.num_features


@EVERY_FAMILY
def test_names_are_unique_and_keys_do_not_collide(options: dict[str, object]) -> None:
    network = network_of(options)
    keys = [spec.prefix + key for spec in network.blocks for key in spec.build().state_dict()]
    assert len(set(keys)) == len(keys)
    assert len({spec.name for spec in network.blocks}) == len(network.blocks)


def test_branches_that_end_in_a_convolution_or_linear_layer_say_so() -> None:
    ends = {
        name: [len(getattr(spec.build(), "branch_ends", ())) for spec in network_of(options).blocks if spec.counted]
        for name, options in SMALL.items()
    }
    assert ends["pre-activation resnet"] == [1, 1] and ends["vit"] == [2, 2]
    assert not any(sum(counts) for name, counts in ends.items() if name not in ("pre-activation resnet", "vit"))


@pytest.mark.parametrize("name", HeadConfig.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
def test_every_head_is_initialised_from_the_stream_alone(name: str) -> None:
    shape = (7, 16) if name in ("tokens", "next_token") else (16, 8, 8)
    states = []
    for poison in (float("nan"), 3.0):
        head = heads.build(name, None, shape, 10)
        for parameter in head.parameters():
            nn.init.constant_(parameter, poison)
        initialise(head, InitConfig(), torch_stream(0, "head"))
        states.append(head.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg", "depth": 11, "stem": "imagenet"}, "model.stem: has no effect on a vgg"),
        ({"name": "resnet", "dropout": 0.1}, "model.dropout: has no effect on a resnet"),
        ({"name": "mlp", "patch": 8}, "model.patch: has no effect on a mlp"),
    ],
)
def test_an_option_that_has_no_effect_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        network_of(options)


def test_flat_samples_are_refused_by_image_networks() -> None:
    with pytest.raises(ModelError, match="reads images"):
        zoo.build(ModelConfig(), (784,), 10)


@pytest.mark.parametrize(("name", "block"), [("resnet_preact", "blocks.0"), ("vit", "encoder_layer_0")])
def test_the_identity_is_refused_naming_the_first_block(name: str, block: str) -> None:
    with pytest.raises(ModelError, match=f"block '{block}'"):
        network_of({"name": name, "depth": 2}, impl="batchnorm")
