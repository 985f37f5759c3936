"""Optimizers and learning-rate schedules by name; a schedule is a function of the step, so a resume needs no state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipetrgl.config.schema import OptimConfig, ScheduleConfig

NamedParameters = Iterable[tuple[str, Tensor]]


def _eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer outside of torch.compile.

    What torch wraps around these functions, for the case that someone compiles them, imports its compiler when it is
    first called: a second at the start of every worker. Nobody compiles an optimizer here.
    """
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    return type(kind.__name__, (kind,), {**bare, "step": torch.no_grad()(inspect.unwrap(kind.step))})


_SGD, _Adam, _AdamW = _eager(torch.optim.SGD), _eager(torch.optim.Adam), _eager(torch.optim.AdamW)


def build(config: OptimConfig, parameters: NamedParameters) -> torch.optim.Optimizer:
    """An optimizer over named parameters; vectors and position tables in a group without decay if so configured."""
    named = list(parameters)
    decayed = [(name, p) for name, p in named if config.decay_vectors or _is_matrix(name, p)]
    names = {name for name, _ in decayed}
    rest = [(name, p) for name, p in named if name not in names]
    groups: list[dict[str, object]] = [{"params": decayed}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    lr, decay = config.lr, config.weight_decay
    fused = config.fused or None  # None leaves torch its own choice, on a GPU a loop over groups of tensors
    if config.name == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return _SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=fused)
    kind = _Adam if config.name == "adam" else _AdamW
    return kind(groups, lr=lr, betas=config.betas, weight_decay=decay, fused=fused)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of 0-based optimizer step `step` of a run of `total_steps`."""
    return config.lr * _factor(config.schedule, step, steps_per_epoch, total_steps)


def peak_rate(config: OptimConfig) -> float:
    """The largest rate that the schedule reaches."""
    return config.lr


def _factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    if config.name == "one_cycle":
        return _one_cycle(config.rise, step, total_steps)
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "cosine":
        done = (step - warmup) / max(1.0, total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.name == "multistep":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return float(config.factor**passed)
    return 1.0


def _one_cycle(rise: float, step: int, total_steps: int) -> float:
    """Cosine from 1/25 up to 1, then down to 1/10,000. Source: Smith and Topin, arXiv 1708.07120."""
    peak = max(1.0, rise * total_steps - 1)
    if step <= peak:
        return _cosine_between(1 / 25, 1.0, step / peak)
    return _cosine_between(1.0, 1e-4, (step - peak) / max(1.0, total_steps - 1 - peak))


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    table = any(part in name for part in ("pos_embed", "position_bias", "class_token", "cls_token", "dist_token"))
    return parameter.ndim > 1 and not table
