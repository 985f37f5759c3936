"""Our own ResNet, VGG and ViT give torchvision's outputs when torchvision's weights are loaded into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.config.schema import ModelConfig
from pipetrgl.models import torchvision_models, zoo

TORCHVISION = torchvision_models.library()


def randomised(model: nn.Module) -> Any:
    """Every parameter and running statistic away from where it starts, where 0 and 1 would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for owner in model.modules():
            if isinstance(owner, nn.BatchNorm2d):
                owner.running_mean.uniform_(-0.1, 0.1, generator=generator)  # type: ignore[union-attr]
                owner.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
            if isinstance(owner, (nn.BatchNorm2d, nn.LayerNorm)):
                owner.weight.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "class_token")):
                parameter.uniform_(-0.1, 0.1, generator=generator)
    return model.eval()


def ours(config: ModelConfig, theirs: nn.Module, x: Tensor) -> Tensor:
    """The last activation of our network with the weights of `theirs`, all of which must find their place."""
    state, used = theirs.state_dict(), set()
    for spec in zoo.build(config, tuple(x.shape[1:]), 10).blocks:
        block = spec.build().eval().to(x.dtype)
        block.load_state_dict({name: state[spec.prefix + name] for name in block.state_dict()})
        used |= {spec.prefix + name for name in block.state_dict()}
        with torch.no_grad():
            x = block(x).activation
    assert {name.partition(".")[0] for name in state.keys() - used} <= {"fc", "heads"}
    return x


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [18, 50, 152])
def test_a_resnet_gives_torchvisions_output_bit_for_bit(depth: int) -> None:
    theirs, x = randomised(TORCHVISION.get_model(f"resnet{depth}", weights=None)), images(32)
    activation = ours(ModelConfig(depth=depth, stem="imagenet"), theirs, x)
    with torch.no_grad():
        logits = theirs.fc(theirs.avgpool(activation).flatten(1))
        assert torch.equal(logits, theirs(x))
    assert logits.std() > 0.1


@pytest.mark.parametrize(("depth", "letter", "batch_norm"), [(11, "A", False), (11, "A", True), (19, "E", True)])
def test_a_vgg_gives_the_output_of_torchvisions_features_bit_for_bit(depth: int, letter: str, batch_norm: bool) -> None:
    #  vgg11, vgg11_bn and vgg19_bn without their classifiers of 124 million parameters
    layers = TORCHVISION.vgg.make_layers(TORCHVISION.vgg.cfgs[letter], batch_norm)
    theirs, x = randomised(nn.ModuleDict({"features": layers})), images(32)
    activation = ours(ModelConfig(name="vgg", depth=depth, batch_norm=batch_norm), theirs, x)
    with torch.no_grad():
        expected = theirs["features"](x)
        # our network leaves out the last max-pool, which no convolution follows
        assert torch.equal(nn.functional.max_pool2d(activation, 2), expected)
    assert expected.std() > 0.001


def test_a_vit_gives_torchvisions_output() -> None:
    theirs, x = (
        randomised(
            TORCHVISION.VisionTransformer(
                image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=10
            )
        ).double(),
        images(32).double(),
    )
    nn.init.normal_(theirs.heads.head.weight, generator=torch.Generator().manual_seed(2))  # torchvision starts it at 0
    config = ModelConfig(name="vit", depth=3, width=32, patch=8, num_heads=4)
    activation = ours(config, theirs, x)
    with torch.no_grad():
        logits = theirs.heads(activation[:, 0])
        # float64: torch's own attention adds up in another order, in 3 layers, to logits of order 10
        torch.testing.assert_close(logits, theirs(x), rtol=0, atol=1e-12)
    assert logits.std() > 0.1
