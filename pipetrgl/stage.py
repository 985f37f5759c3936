"""A stage: consecutive blocks with their auxiliary head, local objective and optimizer, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor, nn

from pipetrgl.blocks import BlockOutput, BlockSpec
from pipetrgl.channels.contracts import ReplicaGroup
from pipetrgl.channels.gradients import GradientSum
from pipetrgl.channels.replicas import add_up
from pipetrgl.errors import ModelError
from pipetrgl.kernels import BlockCall
from pipetrgl.microbatch import Activation, MicroBatch
from pipetrgl.objective import LocalLoss, StageObjective
from pipetrgl.precision import Precision
from pipetrgl.seeds import derive


@dataclass(frozen=True)
class StageOutput:
    """What a stage's forward gives.

    Attributes:
        activation: T_k(z), float32, with graph while training; the loop detaches it before it leaves.
        logits: F_k(T_k(z)), (N, classes) or of a text (N, T, classes), float32.
        loss: the local loss on this micro-batch, with graph while training.
        cost_names: the block of each entry of `loss.by_block`.
    """

    activation: Tensor
    logits: Tensor
    loss: LocalLoss
    cost_names: tuple[str, ...]

    @property
    def trained(self) -> bool:
        """Whether the stage learns from it: only then is there a graph."""
        return self.loss.total.requires_grad


class Reseed(Protocol):
    """Gives every stochastic layer of a block its seed for one micro-batch."""

    def __call__(self, module: nn.Module, seed: int, row_start: int, batch_rows: int) -> None: ...


@dataclass(frozen=True)
class StageParts:
    """Everything that a stage is made of; see `worker.build_stage`."""

    index: int
    num_stages: int
    specs: Sequence[BlockSpec]
    blocks: Sequence[nn.Module]
    calls: Sequence[BlockCall]
    head: nn.Module
    criterion: nn.Module
    objective: StageObjective
    precision: Precision
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    replicas: ReplicaGroup
    gradients: GradientSum
    reseed: Reseed
    seed: int
    device: torch.device


@final
class Stage:
    """Trains its own blocks and head on what comes in; no gradient ever leaves it.

    z (detached) ─▶ blocks T_k ─▶ activation ─▶ next stage
                                      └──▶ head F_k ─▶ logits ─▶ local loss ─▶ backward ─▶ update

    Attributes:
        num_updates: the stage's own; where all stages learn at the same time, the run's optimizer steps.
        num_reused: updates beyond those, on reused micro-batches.
    """

    def __init__(self, parts: StageParts) -> None:
        self.index = parts.index
        self.num_stages = parts.num_stages
        self.specs = tuple(parts.specs)
        self.blocks = tuple(parts.blocks)
        self.head = parts.head
        self.criterion = parts.criterion
        self.objective = parts.objective
        self.optimizer = parts.optimizer
        self.device = parts.device
        self.num_updates = 0
        self.skipped_updates = 0
        self.num_reused = 0
        self._learning_rate = parts.learning_rate
        self.replicas = parts.replicas
        self._gradients = parts.gradients
        self._reseed = parts.reseed
        self._calls = tuple(parts.calls)
        self._precision = parts.precision
        self._seed = parts.seed
        counted = [position for position, spec in enumerate(self.specs) if spec.counted]
        sgd = isinstance(parts.optimizer, torch.optim.SGD)
        self._remembers = {"momentum_buffer"} if sgd else {"step", "exp_avg", "exp_avg_sq"}
        self._first_counted, self._last_counted = counted[0], counted[-1]

    def forward(self, micro_batch: MicroBatch, train: bool) -> StageOutput:
        """Run blocks, head and local loss.

        Args:
            micro_batch: activation (N, ...) and target (N,) or (N, T), on any device.
            train: train mode with graph, and dropout seeded by (seed, block, step); else eval mode without graph.
        """
        for module in (*self.blocks, self.head, self.criterion):
            module.train(train)
        z = _moved(micro_batch.activation, self.device)
        micro_batch = micro_batch.carrying(z)
        with torch.set_grad_enabled(train):
            activation, names, costs = self.run_blocks(micro_batch, train)
            logits = self.answer(activation)
            activation = activation.float()  # what leaves, and every loss, whatever computed it
            target = micro_batch.target.to(self.device, non_blocking=True)
            if train and micro_batch.whole.start == 0 and self.objective.adapts and not micro_batch.reused:
                self._observe(logits, target, len(micro_batch.whole))
            loss = self.objective.local_loss(logits, target, costs)
            if train:
                source = z if micro_batch.image is None else _moved(micro_batch.image, self.device)
                loss = replace(loss, total=self.criterion(source, activation, target, loss.total))
        return StageOutput(activation, logits, loss, names)

    def run_blocks(self, micro_batch: MicroBatch, train: bool) -> tuple[Tensor, tuple[str, ...], list[Tensor]]:
        """The activation of the last block, and the transport cost of each block that has one with its name."""
        names: list[str] = []
        costs: list[Tensor] = []
        for name, activation, cost in self.walk(micro_batch, train):
            x = activation
            if cost is not None:
                names.append(name)
                costs.append(cost)
        return x, tuple(names), costs

    def answer(self, activation: Tensor) -> Tensor:
        """The head's logits, float32."""
        with self._precision.computing():
            logits: Tensor = self.head(activation)
        return logits.float()

    def backward(self, output: StageOutput, micro_batch: MicroBatch) -> None:
        """Add the local loss's gradient, weighted by this micro-batch's share of the step's rows."""
        total = output.loss.total
        if micro_batch.num_rows != micro_batch.batch_rows:
            total = total * (micro_batch.num_rows / micro_batch.batch_rows)
        if micro_batch.closes_step:
            self._gradients.arm()
        self._precision.scaled(total).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """One optimizer step of blocks and head, at the schedule's rate for it."""
        self.complete_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if not self._precision.step(self.optimizer):
            self.skip_update()
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1

    def complete_gradients(self) -> None:
        """Wait until the gradients are those of all replicas' rows."""
        self._gradients.finish()

    def skip_update(self) -> None:
        """In place of `update`: drop the step's gradients; schedule and checkpoints count it like any other step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        self.skipped_updates += 1

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._learning_rate(self.num_updates)

    @property
    def last_block(self) -> str:
        """Name of the last counted block: the place in the network where the head sits."""
        return self.specs[self._last_counted].name

    @property
    def span(self) -> str:
        """First and last block, which together say which stage of which cuts this is."""
        return f"{self.specs[0].name}..{self.last_block}"

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Blocks by state-dict prefix, then the head and the criterion's own layers; names do not depend on K."""
        yield from ((spec.prefix, block) for spec, block in zip(self.specs, self.blocks, strict=True))
        yield f"heads.{self.last_block}.", self.head
        yield f"heads.{self.last_block}.criterion.", self.criterion

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self.named_modules():
            yield from ((prefix + name, parameter) for name, parameter in module.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by network name, the objective's multiplier and the loss scale; no copies of weights."""
        state: dict[str, Tensor] = {}
        for prefix, module in self.named_modules():
            state.update({prefix + name: tensor for name, tensor in module.state_dict().items()})
        objective = self.objective.weight.state().items()
        precision = self._precision.state().items()
        return (
            state
            | {f"objective.{self.last_block}.{name}": tensor for name, tensor in objective}
            | {f"precision.{self.last_block}.{name}": tensor for name, tensor in precision}
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer remembers of each parameter, as `optimizer.<parameter>.<what>`; no copies."""
        remembered = self.optimizer.state
        return {
            f"optimizer.{name}.{what}": value
            for name, parameter in self.named_parameters()
            for what, value in remembered.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """Take weights, buffers, multiplier, loss scale and optimizer state by the names that they have there.

        Returns:
            Modules that `state` has nothing for, such as the head of a new cut; these keep what they have.
        """
        missing = []
        for prefix, module in self.named_modules():
            own = {name: state[prefix + name] for name in module.state_dict() if prefix + name in state}
            for name, tensor in own.items():
                if tensor.shape != module.state_dict()[name].shape:
                    raise ModelError(
                        f"stage {self.index}: the checkpoint holds {prefix}{name} of shape {tuple(tensor.shape)}, but "
                        f"this model's is {tuple(module.state_dict()[name].shape)}; it is of another model"
                    )
            if len(own) == len(module.state_dict()):
                module.load_state_dict(own)
            else:
                missing.append(prefix.rstrip("."))
        for name, parameter in self.named_parameters():
            remembered = _below(state, f"optimizer.{name}.")
            if remembered and remembered.keys() != self._remembers:
                missing.append(f"the optimizer state of {name}")
            elif remembered:
                if any(value.ndim > 0 and value.shape != parameter.shape for value in remembered.values()):
                    raise ModelError(
                        f"stage {self.index}: the checkpoint's optimizer state of {name} has another shape"
                    )
                self.optimizer.state[parameter] = {
                    what: self._as_remembered(value, parameter) for what, value in remembered.items()
                }
        if objective := _below(state, f"objective.{self.last_block}."):
            self.objective.weight.load_state(objective)
        if precision := _below(state, f"precision.{self.last_block}."):
            self._precision.load_state(precision)
        return missing

    def _as_remembered(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A copy as the optimizer itself would have made it; fused kernels rely on equal strides and devices."""
        if value.ndim > 0:
            return torch.empty_like(parameter, requires_grad=False).copy_(value)
        return value.to(self.device, copy=True) if self.optimizer.defaults.get("fused") else value.clone()

    def walk(self, micro_batch: MicroBatch, train: bool) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Run the blocks one by one: the name of each, its activation, and its transport cost if it has one."""
        start: Tensor | None = None
        for position, (name, x, output) in enumerate(self.each_block(micro_batch, train)):
            if position == self._first_counted:
                start = x
            cost = self.objective.measure(x, output)
            if position == self._last_counted and cost is None:
                assert start is not None
                cost = self.objective.measure_stage(start, output.activation)
            yield name, output.activation, cost

    def each_block(self, micro_batch: MicroBatch, train: bool) -> Iterator[tuple[str, Tensor, BlockOutput]]:
        """Run the blocks one by one: the name of each, what it takes, and what it gives."""
        x = self._precision.entering(_moved(micro_batch.activation, self.device))
        for spec, block, call in zip(self.specs, self.blocks, self._calls, strict=True):
            if train:
                seed = derive(self._seed, "dropout", spec.name, micro_batch.step)
                self._reseed(block, seed, micro_batch.row_start, micro_batch.batch_rows)
            with self._precision.computing():
                output = call(x)
            yield spec.name, x, output
            x = output.activation

    def _observe(self, logits: Tensor, target: Tensor, num_rows: int) -> None:
        """Let a multiplier see the step's first micro-batch: of all replicas, whose multipliers stay the same."""
        loss = self.objective.observed_loss(logits, target)
        if self.replicas.num_replicas > 1:
            loss = add_up(self.replicas, loss * (len(target) / num_rows))
        self.objective.weight.observe(loss, self.num_updates)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _moved(activation: Activation, device: torch.device) -> Tensor:
    # A block that takes several tensors gets the tuple; the annotation says Tensor because every block here takes one.
    if isinstance(activation, tuple):
        return tuple(tensor.to(device, non_blocking=True) for tensor in activation)  # type: ignore[return-value]
    return activation.to(device, non_blocking=True)
