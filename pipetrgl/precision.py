"""Number formats of a stage's forward and backward: float32, or autocast to bfloat16 or float16.

    wire, float32 ─▶ [ cast ─ blocks ─ head ] ─▶ float32: logits, losses, transport cost, what the stage hands on
                         under autocast

Parameters, their gradients, running statistics and the optimizer's state are float32 in every format.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol, final

import torch
from torch import Tensor

from pipetrgl.config.schema import TrainConfig
from pipetrgl.errors import DivergedError

FIRST_SCALE = 2.0**16
GROWTH_UPDATES = 2000
_LEAST_SCALE = 1.0


class Precision(Protocol):
    """In which format a stage computes, and how its gradients come back from it."""

    def entering(self, x: Tensor) -> Tensor:
        """The activation as the first block takes it."""

    def computing(self) -> AbstractContextManager[object]:
        """Around each block, and around the head."""

    def scaled(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of `loss`, without effect on the update."""

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer step; False where it was left out because a scaled gradient is not finite."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class _Unscaled:
    """The half of a precision that needs no loss scale."""

    def scaled(self, loss: Tensor) -> Tensor:
        return loss

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        optimizer.step()
        return True

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


@final
class Full(_Unscaled):
    """float32 throughout."""

    def entering(self, x: Tensor) -> Tensor:
        return x

    def computing(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


@final
class BFloat16(_Unscaled):
    """Autocast to bfloat16, whose range is float32's: no loss scale."""

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type

    def entering(self, x: Tensor) -> Tensor:
        return _cast(x, torch.bfloat16)

    def computing(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device_type, torch.bfloat16)


@final
class Float16:
    """Autocast to float16, whose smallest gradients would become 0 and whose largest infinite without a loss scale.

    The scale is a power of two: it halves where a scaled gradient overflows, and that update is left out; it doubles
    after 2,000 updates in a row. Source: Micikevicius et al., arXiv 1710.03740.

    Args:
        device: of the stage.
        stage: its index, for the error.
        stops: where the gradient is not finite at a scale of 1 either, which is no overflow of float16: raise, or let
            the update be left out for ever.
    """

    def __init__(self, device: torch.device, stage: int, stops: bool) -> None:
        self._device_type = device.type
        self._stage = stage
        self._stops = stops
        self._scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_UPDATES)
        self._scaler.scale(torch.zeros((), device=device))  # the scale's tensor does not exist before its first use

    def entering(self, x: Tensor) -> Tensor:
        return _cast(x, torch.float16)

    def computing(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device_type, torch.float16)

    def scaled(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        after = self._scaler.get_scale()
        if after >= before:
            return True
        if after < _LEAST_SCALE:
            if self._stops:
                raise DivergedError(
                    f"stage {self._stage}: a gradient is not finite, and no loss scale of train.precision: fp16 helps; "
                    "lower optim.lr, or raise objective.transport.tau"
                )
            self._scaler.update(_LEAST_SCALE)
        return False

    def state(self) -> dict[str, Tensor]:
        state = self._scaler.state_dict()
        return {"scale": torch.tensor(state["scale"]), "growth_tracker": torch.tensor(state["_growth_tracker"])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        saved = {"scale": float(state["scale"]), "_growth_tracker": int(state["growth_tracker"])}
        self._scaler.load_state_dict(self._scaler.state_dict() | saved)


def build(config: TrainConfig, device: torch.device, stage: int) -> Precision:
    """The precision of one stage."""
    if config.precision == "bf16":
        return BFloat16(device)
    if config.precision == "fp16":
        return Float16(device, stage, stops=config.on_nonfinite == "stop")
    return Full()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Exact where the last block before the cut handed its activation on in this format, as networks with BatchNorm do.
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
