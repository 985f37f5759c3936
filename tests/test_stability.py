"""The stability guard: 0.9 of the limit diverges, 1.1 converges."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from pipetrgl.stability import largest_eigenvalue, tau_limit
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
