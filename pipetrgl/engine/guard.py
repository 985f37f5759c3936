"""The stability guard as a hook: warns once, before the second step, where tau is too small for the learning rate."""

from __future__ import annotations

import logging
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipetrgl.microbatch import MicroBatch
from pipetrgl.stability import Layer, tau_limit
from pipetrgl.stage import Stage, StageOutput

logger = logging.getLogger(__name__)


@final
class StabilityGuard:
    """Catches the input of every layer that ends a branch in the first training forward, then estimates its limit.

    Args:
        stage: its blocks name such layers in `branch_ends`; branches that end in BatchNorm have no limit.
        lr: the largest of the schedule.
        momentum: of SGD.
    """

    def __init__(self, stage: Stage, lr: float, momentum: float) -> None:
        self._stage = stage
        self._lr = lr
        self._momentum = momentum
        self._inputs: dict[nn.Module, Tensor] = {}
        self._layers: list[tuple[str, Layer]] = []
        self._handles: list[RemovableHandle] = []
        if stage.objective.regularised and stage.objective.kind == "branch":
            for spec, block in zip(stage.specs, stage.blocks, strict=True):
                for layer in getattr(block, "branch_ends", ()):
                    self._layers.append((spec.name, layer))
                    self._handles.append(layer.register_forward_pre_hook(self._keep))

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            self._inputs[layer] = inputs[0].detach().float()  # also under autocast

    def __call__(self, micro_batch: MicroBatch, output: StageOutput) -> None:
        if not self._inputs:
            return
        for handle in self._handles:
            handle.remove()
        # with multipliers the cost's weight is 1 / lambda: the same as tau = lambda / 2
        tau = 1 / (2 * float(self._stage.objective.weight.value()))
        for name, layer in self._layers:
            limit = tau_limit(layer, self._inputs[layer], self._lr, self._momentum, self._stage.objective.norm)
            if tau < limit:
                logger.warning(
                    "s%d/%d block %s: tau = %g is below %.3g, where SGD with lr %g and momentum %g diverges on the "
                    "transport cost alone; raise objective.transport.tau or lower optim.lr",
                    self._stage.index, self._stage.num_stages, name, tau, limit, self._lr, self._momentum,
                )  # fmt: skip
        self._layers.clear()
        self._inputs.clear()

    def close(self) -> None:
        pass
