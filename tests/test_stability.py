"""The stability guard: 0.9 of the limit diverges, 1.1 converges."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipetrgl.blueprint import Blueprint, draw_up
from pipetrgl.config.schema import ModelConfig
from pipetrgl.data.dataset import DataSpec
from pipetrgl.errors import ModelError
from pipetrgl.stability import certain_limit, largest_eigenvalue, tau_limit
from tests.equivalence.runs import run, tiny


def test_the_largest_eigenvalue_of_a_linear_layers_input_is_found() -> None:
    #  rows (2, 0) and (0, 1): E[phi phi^T] = diag(2, 1/2)
    assert largest_eigenvalue(nn.Linear(2, 3, bias=False), torch.tensor([[2.0, 0.0], [0.0, 1.0]])) == pytest.approx(2)


def test_a_convolutions_columns_are_its_patches() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.randn(4, 2, 5, 5).relu()
    columns = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
    expected = torch.linalg.eigvalsh(columns.T @ columns / len(columns))[-1]
    # power iteration for 20 rounds; the second eigenvalue is several times smaller
    assert largest_eigenvalue(layer, x) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize(("factor", "converges"), [(0.9, False), (1.1, True)])
def test_sgd_on_the_cost_alone_diverges_below_the_limit_and_converges_above(
    norm: str, factor: float, converges: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    x = torch.rand(4, 2, 5, 5, generator=generator)
    nn.init.normal_(layer.weight, generator=generator)
    lr, momentum = 0.1, 0.9
    tau = factor * tau_limit(layer, x, lr, momentum, norm)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    start = float(layer.weight.detach().norm())
    for _ in range(400):
        r = layer(x)
        cost = r.square().mean() if norm == "mean" else r.square().flatten(1).sum(1).mean()
        optimizer.zero_grad()
        (cost / (2 * tau)).backward()
        optimizer.step()
    assert (float(layer.weight.detach().norm()) < start) is converges


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize(("factor", "converges"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("end", ["BatchNorm", "bias"])
def test_below_the_certain_limit_sgd_diverges_whatever_the_data(
    end: str, factor: float, converges: bool, norm: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    #  inputs without spread leave the bias alone with the cost: lambda_max is 1, the least that a bias allows
    layer = nn.BatchNorm2d(3) if end == "BatchNorm" else nn.Conv2d(2, 3, 1)
    x = torch.randn(4, 3, 5, 5, generator=generator) if end == "BatchNorm" else torch.zeros(4, 2, 5, 5)
    nn.init.normal_(layer.bias, generator=generator)
    lr, momentum = 0.1, 0.9
    #  by hand: 0.1 / (2 * 1.9 * 3), and 75 features in a sample
    limit = certain_limit((3, 5, 5), lr, momentum, norm)
    assert limit == pytest.approx(0.1 / 11.4 * (75 if norm == "sum" else 1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    start = float(layer.bias.detach().norm())
    for _ in range(400):
        r = layer(x)
        cost = r.square().mean() if norm == "mean" else r.square().flatten(1).sum(1).mean()
        optimizer.zero_grad()
        (cost / (2 * factor * limit)).backward()
        optimizer.step()
    assert (float(layer.bias.detach().norm()) < start) is converges


def test_the_certain_limit_is_never_above_that_of_a_batch() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(6, 7, 4)
    #  the bias as a further weight, on an input of 1
    widened = nn.Linear(5, 3, bias=False)
    of_the_batch = tau_limit(widened, torch.cat([x, torch.ones(6, 7, 1)], dim=-1), lr=0.1, momentum=0.9)
    assert certain_limit(tuple(layer(x).shape[1:]), lr=0.1, momentum=0.9) < of_the_batch


@pytest.mark.parametrize(
    ("model", "block"), [("resnet", "layer1.0"), ("vit", "encoder_layer_0"), ("torchvision:resnet18", "layer1.0")]
)
def test_a_tau_that_is_certain_to_diverge_is_an_error_before_training(tmp_path: Path, model: str, block: str) -> None:
    def blueprint(tau: float | list[float], **sections: Any) -> Blueprint:
        name = "resnet" if ":" in model else model
        objective = {"transport": {"tau": tau, **sections.pop("transport", {})}, **sections.pop("objective", {})}
        config = tiny(name, tmp_path, objective=objective, pipeline={"stages": 2}, **sections)
        if ":" in model:
            config = config.model_copy(update={"model": ModelConfig.model_validate({"name": model})})
        return draw_up(config, DataSpec("synthetic", 128, 16, 16, (3, 32, 32), 4))

    #  lr 0.05, momentum 0.9, 4, 12 and 64 channels
    limit = 0.05 / (3.8 * {"resnet": 4, "vit": 12, "torchvision:resnet18": 64}[model])
    with pytest.raises(ModelError, match=f"in stage 0 is below {limit:.3g}, .* of block '{block}' alone"):
        blueprint(0.9 * limit)
    with pytest.raises(ModelError, match="in stage 1 is below"):
        blueprint([1.0, 1e-9])
    blueprint(1.1 * limit)
    blueprint(0.9 * limit, optim={"lr": 0.04})
    for allowed in (
        {"optim": {"name": "adam"}}, {"objective": {"name": "vangl"}}, {"transport": {"kind": "displacement"}}
    ):  # fmt: skip
        blueprint(0.9 * limit, **allowed)
    with pytest.raises(ModelError, match="is below"):
        blueprint(2 * limit, transport={"norm": "sum"})


@pytest.mark.parametrize("model", ["resnet_preact", "vgg", "mlp"])
def test_where_only_the_data_decide_a_small_tau_is_no_error(tmp_path: Path, model: str) -> None:
    config = tiny(model, tmp_path, objective={"transport": {"tau": 1e-9}}, pipeline={"stages": 2})
    draw_up(config, DataSpec("synthetic", 128, 16, 16, (3, 32, 32), 4))


def test_a_run_below_the_limit_warns_once_and_names_the_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipetrgl"), "propagate", True)
    # evaluations left out: below the limit the weights are far off after three steps already
    options = {
        "pipeline": {"stages": 2},
        "launcher": {"name": "serial"},
        "train": {"max_steps": 3},
        "evaluate": {"valid_every": 0, "test_at_end": False},
    }
    run(tiny("resnet_preact", tmp_path / "a", objective={"transport": {"tau": 1e-5}}, optim={"lr": 1e-3}, **options))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("s0/2 block blocks.0: tau = 1e-05 is below" in message for message in warnings)
    assert len(warnings) == len(set(warnings)) <= 8
    caplog.clear()
    run(tiny("resnet_preact", tmp_path / "b", objective={"transport": {"tau": 100.0}}, **options))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
