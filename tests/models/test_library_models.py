"""Classifiers of torchvision and timm, listed as blocks: the same outputs, and residuals that a hook sees too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockSpec, Network
from pipetrgl.config.schema import InitConfig, ModelConfig
from pipetrgl.errors import ModelError
from pipetrgl.models import timm_models, torchvision_models, zoo
from pipetrgl.models.init import initialise
from pipetrgl.models.stochastic import reseed
from pipetrgl.objective import transport_cost
from pipetrgl.seeds import torch_stream

TORCHVISION = torchvision_models.library()
TIMM = timm_models._timm()


def network_of(name: str, size: int = 64, impl: str = "auto", **options: Any) -> Network:
    return zoo.build(ModelConfig.model_validate({"name": name, **options}), (3, size, size), 10, impl)


def built(spec: BlockSpec, theirs: nn.Module) -> nn.Module:
    """A block with the weights of the original model."""
    block, state = spec.build(), theirs.state_dict()
    block.load_state_dict({name: state[spec.prefix + name] for name in block.state_dict()})
    return block


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_same_outputs(network: Network, theirs: nn.Module, classify: Callable[[Tensor], Tensor], size: int) -> None:
    x, seen = images(size), set()
    with torch.no_grad():
        expected = theirs.eval()(x)
        for spec in network.blocks:
            block = built(spec, theirs).eval()
            seen |= {spec.prefix + name for name in block.state_dict()}
            x = block(x).activation
        assert torch.equal(classify(x), expected)
    left_out = {name.partition(".")[0] for name in set(theirs.state_dict()) - seen}
    assert left_out <= {"fc", "classifier", "head", "heads", "head_dist", "fc_norm"}


@pytest.mark.parametrize(
    ("name", "num_counted"),
    [
        ("resnet18", 8),
        ("resnet50", 16),
        ("resnet152", 50),
        ("vgg19_bn", 16),
        ("swin_t", 12),
        ("vit_b_16", 12),
        ("convnext_tiny", 18),
    ],
)
def test_torchvision_blocks_give_the_models_output_bit_for_bit(name: str, num_counted: int) -> None:
    size = 32
    options = {"image_size": size} if name.startswith("vit") else {}
    theirs = TORCHVISION.get_model(name, weights=None, **options)
    network = network_of(f"torchvision:{name}", size)
    assert sum(spec.counted for spec in network.blocks) == num_counted

    def classify(x: Tensor) -> Tensor:
        if name.startswith("vit"):
            logits: Tensor = theirs.heads(x[:, 0])
            return logits
        last = {"resnet": "fc", "swin_t": "head"}.get(name.rstrip("0123456789"), "classifier")
        pooled = theirs.avgpool(x)
        classified: Tensor = getattr(theirs, last)(pooled if name.startswith("convnext") else pooled.flatten(1))
        return classified

    assert_same_outputs(network, theirs, classify, size)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"],
)
def test_timm_blocks_give_the_models_output_bit_for_bit(name: str) -> None:
    theirs = TIMM.create_model(name, pretrained=False, img_size=(32, 32))
    network = network_of(f"timm:{name}", 32)
    assert [spec.name for spec in network.blocks] == ["stem", *(f"blocks.{i}" for i in range(12)), "norm"]
    assert_same_outputs(network, theirs, theirs.forward_head, 32)


def assert_taps(
    network: Network, name: str, theirs: nn.Module, tapped: list[nn.Module], rewritten: Callable[[Tensor], Tensor]
) -> None:
    """A block's transport cost, by its taps, by hooks on the original's layers, and with gradients by autograd."""
    spec = next(spec for spec in network.blocks if spec.name == name)
    ours = built(spec, theirs).train().double()
    index = network.blocks.index(spec)
    shape = zoo.output_shapes(network)[index - 1]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    cost = transport_cost(ours(x).residuals)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # a copy: torchvision's ResNet adds the shortcut in place
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [layer.register_forward_hook(keep) for layer in tapped]
    rewritten(x)
    for handle in handles:
        handle.remove()
    # float64: means of a few thousand squares of order 1 round at 1e-14
    expected = torch.stack([r.square().mean() for r in seen]).sum()
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)

    parameters = dict(ours.named_parameters())
    theirs_by_name = {n.removeprefix(spec.prefix): p for n, p in theirs.named_parameters()}
    mine = torch.autograd.grad(cost, list(parameters.values()), allow_unused=True)
    reference = torch.autograd.grad(expected, [theirs_by_name[n] for n in parameters], allow_unused=True)
    for parameter, one, other in zip(parameters, mine, reference, strict=True):
        # the projection shortcut of a down-sampling block is not counted
        assert (one is None) == (other is None) == parameter.startswith("downsample"), parameter
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("impl", ["auto", "autograd"])
def test_a_basic_block_is_tapped_after_its_last_batchnorm(impl: str) -> None:
    theirs = TORCHVISION.get_model("resnet18", weights=None).double().train()
    block = theirs.layer2[1]
    assert_taps(network_of("torchvision:resnet18", impl=impl), "layer2.1", theirs, [block.bn2], block)


@pytest.mark.parametrize("name", ["layer3.0", "layer3.1"])
def test_a_bottleneck_is_tapped_after_its_last_batchnorm(name: str) -> None:
    theirs = TORCHVISION.get_model("resnet50", weights=None).double().train()
    block = theirs.get_submodule(name)  # with its projection shortcut, and without
    assert_taps(network_of("torchvision:resnet50"), name, theirs, [block.bn3], block)


def test_a_vgg_layer_is_tapped_where_shapes_match() -> None:
    theirs = TORCHVISION.vgg.make_layers(TORCHVISION.vgg.cfgs["E"], batch_norm=True).double().train()
    network = network_of("torchvision:vgg19_bn")
    blocks = [built(spec, nn.ModuleDict({"features": theirs})).double() for spec in network.blocks if spec.counted]
    x, residuals = images(32).double(), []
    for block in blocks:
        output = block(x)
        x = output.activation
        residuals.append(output.residuals)
    assert sum(map(len, residuals)) == 12
    position = [spec.name for spec in network.blocks].index("features.30")
    with torch.no_grad():
        before, after = theirs[:30](images(32).double()), theirs[:33](images(32).double())
    (residual,) = residuals[position]
    assert residual.value is not None
    assert torch.equal(residual.value, after - before)


def test_a_convnext_block_is_tapped_after_its_scale() -> None:
    theirs = TORCHVISION.get_model("convnext_tiny", weights=None).double().train()
    block = theirs.features[3][1]
    block.stochastic_depth.p = 0.0  # still called, so a hook sees the residual
    nn.init.constant_(block.layer_scale, 0.5)
    network = network_of("torchvision:convnext_tiny")
    spec = next(spec for spec in network.blocks if spec.name == "features.3.1")
    changed = _without_drop_path(network, spec, ("stochastic_depth",))
    assert_taps(changed, "features.3.1", theirs, [block.stochastic_depth], block)


def test_a_swin_block_is_tapped_after_both_branches() -> None:
    theirs = TORCHVISION.get_model("swin_t", weights=None).double().train()
    block = theirs.features[1][1]  # a shifted window
    block.stochastic_depth.p = 0.0
    network = network_of("torchvision:swin_t")
    spec = next(spec for spec in network.blocks if spec.name == "features.1.1")
    assert_taps(
        _without_drop_path(network, spec), "features.1.1", theirs, [block.attn, block.mlp],
        lambda x: block(x.permute(0, 2, 3, 1)),
    )  # fmt: skip


def _without_drop_path(
    network: Network, spec: BlockSpec, paths: Sequence[str] = ("drop_path1", "drop_path2")
) -> Network:
    def build() -> nn.Module:
        block = spec.build()
        for path in paths:
            block.get_submodule(path).dropout.p = 0.0  # type: ignore[union-attr]
        return block

    changed = BlockSpec(spec.name, spec.prefix, build)
    blocks = tuple(changed if other is spec else other for other in network.blocks)
    return Network(network.name, blocks, network.input_shape, network.num_classes)


def test_a_torchvision_vit_block_is_tapped_after_both_branches() -> None:
    theirs = TORCHVISION.get_model("vit_b_16", weights=None, image_size=32).double().train()
    block = theirs.encoder.layers[3]
    network = network_of("torchvision:vit_b_16", 32)
    assert_taps(network, "encoder_layer_3", theirs, [block.self_attention, block.mlp], block)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_timm_block_is_tapped_after_both_branches(name: str) -> None:
    theirs = TIMM.create_model(name, pretrained=False, img_size=(32, 32)).double().train()
    block = theirs.blocks[2]
    assert_taps(network_of(f"timm:{name}", 32), "blocks.2", theirs, [block.attn, block.mlp], block)


def test_a_timm_block_with_layer_scale_is_tapped_after_it() -> None:
    theirs = TIMM.create_model("deit3_small_patch16_224", pretrained=False, img_size=(32, 32)).double().train()
    block = theirs.blocks[2]
    assert_taps(network_of("timm:deit3_small_patch16_224", 32), "blocks.2", theirs, [block.ls1, block.ls2], block)


@pytest.mark.parametrize("name", ["torchvision:swin_t", "timm:vit_tiny_patch16_224"])
def test_the_two_residuals_drop_rows_of_their_own_and_are_measured_after_it(name: str) -> None:
    network = network_of(name, 32, **({"drop_path": 0.5} if name.startswith("timm") else {}))
    block = [spec for spec in network.blocks if spec.counted][-1].build().train()
    initialise(block, InitConfig(), torch_stream(0, "block"))
    for path in (block.drop_path1, block.drop_path2):
        path.dropout.p = 0.5  # type: ignore[union-attr]
    reseed(block, 0, row_start=0, batch_rows=64)
    x = torch.randn(64, *zoo.output_shapes(network)[-1], generator=torch.Generator().manual_seed(0))
    dropped = [(residual.value == 0).flatten(1).all(1) for residual in block(x).residuals]
    assert all(16 < rows.sum() < 48 for rows in dropped)
    assert not torch.equal(*dropped)


def test_no_layer_draws_dropout_masks_of_its_own() -> None:
    for name in ("torchvision:vit_b_16", "torchvision:swin_t", "timm:vit_tiny_patch16_224"):
        modules = [module for spec in network_of(name, 32).blocks for module in spec.build().modules()]
        assert not any(isinstance(m, nn.Dropout) or type(m).__name__ == "StochasticDepth" for m in modules)


def test_start_weights_are_a_function_of_seed_and_block() -> None:
    def weights() -> dict[str, Tensor]:
        spec = network_of("timm:deit3_small_patch16_224", 32).blocks[1]
        block = spec.build()
        initialise(block, InitConfig(gain=1.0), torch_stream(0, spec.name))
        return block.state_dict()

    one, other = weights(), weights()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["ls1.gamma"], torch.full((384,), 1e-6))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision:resnet19", {}, "no classifier 'resnet19'. Did you mean 'resnet1"),
        ("torchvision:densenet121", {}, "cannot be listed: it is a DenseNet"),
        ("torchvision:swin_v2_t", {}, "'features.1.0' is a SwinTransformerBlockV2"),
        ("torchvision:resnet18", {"depth": 50}, "model.depth: has no effect"),
        ("torchvision:resnet18", {"drop_path": 0.1}, "model.drop_path: has no effect"),
        ("torchvision:swin_t", {"impl": "batchnorm"}, "block 'features.1.0'"),
        ("timm:vit_tiny_patch17_224", {}, "timm has no model 'vit_tiny_patch17_224'. Nearest: 'vit_tiny_patch16_224'"),
        ("timm:resnet50", {}, "the blocks of timm's 'resnet' are not known"),
    ],
)
def test_a_model_that_cannot_be_had_says_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        network_of(name, **options)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_extra_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    for module, loader in ((torchvision_models, "library"), (timm_models, "_timm")):
        unwrapped = getattr(module, loader).__wrapped__
        monkeypatch.setattr(module, loader, functools.cache(unwrapped))
        monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ModelError, match=r"pip install 'pipetrgl\[vision\]'"):
        network_of(f"{library}:resnet18")


def test_images_that_a_model_cannot_read_are_refused() -> None:
    config = ModelConfig(name="torchvision:resnet18")
    with pytest.raises(ModelError, match="read RGB images, not 1 channels"):
        zoo.build(config, (1, 28, 28), 10)
    with pytest.raises(ModelError, match="images of \\(40, 40\\)"):
        zoo.build(ModelConfig(name="torchvision:vit_b_16"), (3, 40, 40), 10)


def test_the_heads_read_what_the_blocks_hand_on() -> None:
    assert zoo.output_shapes(network_of("torchvision:swin_t", 32))[-1] == (768, 1, 1)
    assert zoo.output_shapes(network_of("timm:vit_tiny_patch16_224", 32))[-1] == (5, 192)
