"""The rivals' losses on values that can be counted by hand, and a run of each over two launchers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrgl.blueprint import draw_up
from pipetrgl.channels.codecs import CODECS, decode, encode
from pipetrgl.config.load import load
from pipetrgl.config.schema import Config, ReplayConfig
from pipetrgl.errors import ModelError
from pipetrgl.launchers.start import describe
from pipetrgl.microbatch import Split
from pipetrgl.objectives.contract import AsItIs
from pipetrgl.objectives.infopro import InfoPro, PixelError, Resize, UnexplainedShare, on_the_line
from pipetrgl.objectives.predsim import PredSim, similarity, target_similarity
from pipetrgl.worker import Job, build_loader, build_stage
from tests.equivalence.runs import MODELS, assert_equal_runs, run, tiny, weights

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RIVALS: dict[str, dict[str, Any]] = {
    "predsim": {"name": "predsim", "predsim": {"beta": 0.9}},
    "infopro": {"name": "infopro", "infopro": {"reconstruction": [2.0, 1.0], "task": [0.5, 1.0]}},
    "infopro-input": {"name": "infopro", "infopro": {"target": "input"}},
}


def as_identity(layer: nn.Conv2d) -> None:
    """The 3x3 convolution that gives its input back."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, 1, 1] = torch.eye(layer.weight.shape[0])


def test_similarity_is_the_cosine_of_centred_rows() -> None:
    #  (1, 2, 3) and (3, 4, 5) less their means are both (-1, 0, 1); (3, 2, 1) is (1, 0, -1); (1, 3, 2) is (-1, 1, 0)
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    expected = torch.tensor([[1, 1, -1, 0.5], [1, 1, -1, 0.5], [-1, -1, 1, -0.5], [0.5, 0.5, -0.5, 1]])
    assert torch.allclose(similarity(rows), expected, atol=1e-6)  # float32: a few units of the last place


def test_similarity_of_maps_compares_the_spread_of_each_channel() -> None:
    #  two pixels (a, b) have the standard deviation |a - b| / sqrt 2: row 0 (2, 0) / sqrt 2, row 1 (0, 6) / sqrt 2
    maps = torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]], [[[1.0, 1.0]], [[-3.0, 3.0]]]])
    assert torch.allclose(similarity(maps), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), atol=1e-6)


def test_a_row_without_variation_has_similarity_and_gradient_zero() -> None:
    maps = torch.zeros(2, 3, 2, 2, requires_grad=True)
    found = similarity(maps)
    assert found.equal(torch.zeros(2, 2))
    (gradient,) = torch.autograd.grad(found.sum(), maps)
    assert gradient.equal(torch.zeros_like(maps))


def test_target_similarity_is_that_of_one_hot_rows() -> None:
    target = torch.tensor([0, 2, 0, 3])
    assert torch.allclose(target_similarity(target, 4), similarity(F.one_hot(target, 4).float()), atol=1e-6)
    assert target_similarity(torch.tensor([0, 1]), 3).equal(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))


def test_predsim_weighs_task_loss_and_similarity_loss() -> None:
    #  S(H) = [[1, -1], [-1, 1]] as above; one class: S(Y) all 1, mean of (0, 4, 4, 0) is 2; 0.25 * 3 + 0.75 * 2 = 2.25
    criterion = PredSim(0.75, (2, 1, 2), num_classes=2)
    assert isinstance(criterion.project, nn.Conv2d)
    as_identity(criterion.project)
    maps = torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]], [[[1.0, 1.0]], [[-3.0, 3.0]]]])
    loss = criterion(maps, maps, torch.tensor([1, 1]), torch.tensor(3.0))
    assert float(loss.detach()) == pytest.approx(2.25, abs=1e-6)


def test_resize_is_bilinear_with_aligned_corners() -> None:
    x = torch.randn(2, 3, 4, 7)
    expected = F.interpolate(x, size=(8, 5), mode="bilinear", align_corners=True)
    assert torch.allclose(Resize((4, 7), (8, 5))(x), expected, atol=1e-5)
    row = Resize((1, 2), (1, 3))(torch.tensor([[[[0.0, 4.0]]]]))
    assert row.flatten().tolist() == [0, 2, 4]


def test_infopro_weighs_task_loss_and_the_unexplained_share_of_the_input() -> None:
    #  a decoder that answers 0 where z = (-1, 1): mean square 1, variance 1, share 1;   2 * 1 + 0.5 * 3 = 3.5
    #  z = (1, 3) has variance 1 and mean square 5:                                     2 * 5 + 0.5 * 3 = 11.5
    criterion = InfoPro((2.0, 0.5), UnexplainedShare(), source=(1, 1, 2), hands_on=(4, 1, 1))
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.zero_()
    h, target, task = torch.randn(2, 4, 1, 1), torch.tensor([0, 1]), torch.tensor(3.0)
    for pixels, expected in (([-1.0, 1.0], 3.5), ([1.0, 3.0], 11.5)):
        z = torch.tensor([[[pixels]], [[pixels]]])
        assert float(criterion(z, h, target, task).detach()) == pytest.approx(expected)


def test_infopro_weighs_task_loss_and_the_cross_entropy_of_the_images_pixels() -> None:
    #  an answer of 0 is a probability of 1/2, so every pixel costs ln 2:          2 ln 2 + 0.5 * 3
    #  an answer of ln 3 is 3/4; pixels 0 and 1 cost -ln 1/4 and -ln 3/4:          ln 4 + ln 4/3 + 0.5 * 3
    criterion = InfoPro((2.0, 0.5), PixelError((0.5,), (0.25,)), source=(1, 1, 2), hands_on=(4, 1, 1))
    conv = criterion.decoder.get_submodule("conv2")
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    h, target, task = torch.randn(2, 4, 1, 1), torch.tensor([0, 1]), torch.tensor(3.0)
    image = torch.tensor([[[[-2.0, 2.0]]], [[[-2.0, 2.1]]]])  # pixels 0, 1, 0 and, after rounding, 1.025
    for answer, expected in ((0.0, 2 * math.log(2)), (math.log(3), math.log(4) + math.log(4 / 3))):
        with torch.no_grad():
            for parameter in criterion.parameters():
                parameter.zero_()
            conv.bias.fill_(answer)
        assert float(criterion(image, h, target, task).detach()) == pytest.approx(expected + 1.5)


def test_pixels_are_what_the_loader_read(tmp_path: Path) -> None:
    #  a pixel p of 0 .. 255 became (p / 255 - 0.5) / 0.25; the BCE of a large answer a is a (1 - p / 255)
    config = tiny("resnet", tmp_path, objective=RIVALS["infopro"], pipeline={"stages": 2})
    blueprint = draw_up(config, describe(config))
    with build_loader(Job(blueprint, tmp_path, {})) as loader:
        images = next(batch for batch in loader if batch.split is Split.TRAIN).tensors[0]
    pixels = images * 0.25 + 0.5
    assert torch.allclose(255 * pixels, (255 * pixels).round(), atol=1e-3)
    error = PixelError(blueprint.spec.mean, blueprint.spec.std)(torch.full_like(images, 20.0), images)
    assert float(error) == pytest.approx(20 * float(1 - pixels.mean()), rel=1e-4)


def test_infopro_of_an_input_without_variation_is_finite() -> None:
    criterion = InfoPro((1.0, 1.0), UnexplainedShare(), source=(1, 2, 2), hands_on=(1, 2, 2))
    z = torch.zeros(2, 1, 2, 2)
    loss = criterion(z, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), torch.tensor(1.0))
    assert math.isfinite(loss.detach())


@pytest.mark.parametrize(
    ("num_stages", "expected"), [(2, [5.0]), (3, [5.0, 1.0]), (5, [5.0, 5 - 4 / 3, 5 - 8 / 3, 1.0])]
)
def test_weights_lie_on_a_line_over_all_stages_but_the_last(num_stages: int, expected: list[float]) -> None:
    found = [on_the_line((5.0, 1.0), stage, num_stages) for stage in range(num_stages - 1)]
    assert found == pytest.approx(expected)


def test_the_last_stage_of_infopro_reconstructs_nothing(tmp_path: Path) -> None:
    config = tiny("resnet", tmp_path, objective={**RIVALS["infopro"], "transport": {}}, pipeline={"stages": 3})
    blueprint = draw_up(config, describe(config))
    kinds = [type(blueprint.criterion(stage)) for stage in range(3)]
    assert kinds == [InfoPro, InfoPro, AsItIs]
    assert [blueprint.image_shape(stage) for stage in range(3)] == [None, (3, 8, 8), None]


@pytest.mark.parametrize(("target", "written"), [("image", [3, 3, 3]), ("input", [3, 8, 16])])
def test_a_decoder_writes_the_image_or_the_stages_input(tmp_path: Path, target: str, written: list[int]) -> None:
    model, objective = {**MODELS["resnet"], "width": 8}, {"name": "infopro", "infopro": {"target": target}}
    config = tiny("resnet", tmp_path, model=model, objective={**objective, "transport": {}}, pipeline={"stages": 4})
    blueprint = draw_up(config, describe(config))
    criteria = [blueprint.criterion(stage) for stage in range(3)]
    found = [criterion.get_submodule("decoder.conv2") for criterion in criteria]
    assert [layer.out_channels for layer in found if isinstance(layer, nn.Conv2d)] == written


@pytest.mark.parametrize("name", RIVALS)
def test_threads_equal_serial_bit_for_bit(tmp_path: Path, name: str) -> None:
    def trained(launcher: str) -> Path:
        options: dict[str, Any] = {"objective": RIVALS[name], "pipeline": {"stages": 3}}
        return run(tiny("resnet", tmp_path / launcher, **options, launcher={"name": launcher}))

    threads, serial = trained("threads"), trained("serial")
    assert_equal_runs(threads, serial)
    own = {key.split(".criterion.")[1].split(".")[0] for key in weights(serial) if ".criterion." in key}
    assert own == ({"project"} if name == "predsim" else {"decoder"})


@pytest.mark.parametrize("name", RIVALS)
def test_resuming_a_rival_equals_never_stopping(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"objective": RIVALS[name], "pipeline": {"stages": 2}, "launcher": {"name": "serial"}}
    options["optim"] = {"schedule": {"name": "constant"}}  # the others depend on the number of steps
    whole = run(tiny("resnet", tmp_path / "whole", **options))
    half = run(tiny("resnet", tmp_path / "half", **options, train={"max_steps": 14}))
    resumed = run(tiny("resnet", tmp_path / "half", **options, checkpoint={"resume": str(half)}))
    mine, theirs = weights(resumed), weights(whole)
    assert all(mine[key].equal(tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", RIVALS)
def test_start_weights_are_those_of_every_objective_and_own_layers_count_as_the_heads(
    tmp_path: Path, name: str
) -> None:
    def stage_0(objective: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        config = tiny("resnet", tmp_path, objective=objective, pipeline={"stages": 2})
        blueprint = draw_up(config, describe(config))
        return build_stage(blueprint, 0, CPU).state(), blueprint.stage_parameters(0)[1]

    plain, num_plain = stage_0({"name": "vangl"})
    rival, num_rival = stage_0(RIVALS[name])
    assert all(rival[key].equal(tensor) for key, tensor in plain.items())
    #  stage 0 hands on 8 channels, the image has 3: predsim 8 * 8 * 9;
    #  infopro 8 * 12 * 9 + 12, BatchNorm 2 * 12, and 12 * 3 * 9 + 3
    extra = {"predsim": 576, "infopro": 900 + 327, "infopro-input": 900 + 327}
    assert num_rival - num_plain == extra[name]


@pytest.mark.parametrize(("name", "model"), [("predsim", "vit"), ("infopro", "vit"), ("infopro", "mlp")])
def test_a_rival_without_what_it_needs_is_an_error_before_training(tmp_path: Path, name: str, model: str) -> None:
    config = tiny(model, tmp_path, objective=RIVALS[name], pipeline={"stages": 2})
    needed = {"predsim": "compares maps or vectors", "infopro": "needs the reconstruction of an image or a map"}
    with pytest.raises(ModelError, match=needed[name]):
        draw_up(config, describe(config))


def test_a_section_of_another_rival_is_an_error() -> None:
    with pytest.raises(ValueError, match="predsim.beta: only used with objective.name: predsim"):
        Config.model_validate({"objective": {"name": "infopro", "predsim": {"beta": 0.5}}})


def test_the_config_of_dgl_is_plain_greedy_learning_with_its_head() -> None:
    dgl, quickstart = load(CONFIGS / "rivals" / "dgl.yaml"), load(CONFIGS / "quickstart.yaml")
    assert (dgl.objective.name, dgl.model.head.name) == ("vangl", "mlp_sr")
    assert dgl.optim == quickstart.optim
    assert dgl.train == quickstart.train
    assert dgl.model.cuts == quickstart.model.cuts


def test_dgl_with_replay_differs_from_dgl_in_the_order_alone() -> None:
    replay, dgl = load(CONFIGS / "rivals" / "dgl_replay.yaml"), load(CONFIGS / "rivals" / "dgl.yaml")
    order = {"train": replay.train, "run": replay.run}
    assert replay.train == dgl.train.model_copy(update={"order": "replay", "replay": ReplayConfig(size=8, max_reuse=2)})
    assert replay == dgl.model_copy(update=order)


def test_dgl_equals_a_plain_loop_of_cross_entropies_over_detached_stages(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective": {"name": "vangl"},
        "pipeline": {"stages": 2},
        "optim": {"lr": 0.05, "schedule": {"name": "constant"}},
        "train": {"epochs": 1, "max_steps": 5},
        "launcher": {"name": "serial"},
    }
    model = {**MODELS["resnet"], "head": {"name": "mlp_sr"}}
    config = tiny("resnet", tmp_path, model=model, **options)
    blueprint = draw_up(config, describe(config))
    stages = [build_stage(blueprint, index, CPU) for index in range(2)]
    optimizers = [
        torch.optim.SGD([p for _, p in stage.named_parameters()], 0.05, momentum=0.9, weight_decay=2e-4)
        for stage in stages
    ]
    for batch in build_loader(Job(blueprint, tmp_path, {})):
        if batch.split is not Split.TRAIN:
            continue
        x = batch.activation
        assert isinstance(x, Tensor)
        for stage, optimizer in zip(stages, optimizers, strict=True):
            for block in stage.blocks:
                x = block.train()(x).activation
            loss = F.cross_entropy(stage.head.train()(x), batch.target, label_smoothing=0.1)
            handed_on = decode(CODECS["fp32"], encode(CODECS["fp32"], x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = handed_on
    trained = weights(run(config))
    expected: dict[str, Tensor] = stages[0].state() | stages[1].state()
    assert all(trained[name].equal(tensor) for name, tensor in expected.items())
