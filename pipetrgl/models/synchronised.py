"""BatchNorm over the rows of all replicas of a stage: normalises with their common mean and variance.

    n = sum_r n_r     mean = sum_r n_r mean_r / n     v = sum_r n_r (v_r + (mean_r - mean) ** 2) / n

torch's own SyncBatchNorm needs a GPU, and knows nothing of the mean square that the transport cost is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipetrgl.models.batchnorm import BatchNorm2d, cost_gradients, mean_square_of


@final
class Group:
    """The replicas, as a layer sees them.

    Args:
        replica, num_replicas: this one's place.
        add_up: replaces a tensor by its sum over all replicas, in place, and returns it; all ask in the same order.
    """

    def __init__(self, replica: int, num_replicas: int, add_up: Callable[[Tensor], Tensor]) -> None:
        self.replica = replica
        self.num_replicas = num_replicas
        self.add_up = add_up


def synchronise(module: nn.Module, group: Group) -> None:
    """Replace every `nn.BatchNorm1d` and `nn.BatchNorm2d` below `module`; parameters, buffers and names stay."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child, group))


@final
class SynchronisedBatchNorm(BatchNorm2d):
    """Takes the place of a layer over (N, C), (N, C, L) or (N, C, H, W); in eval mode it is that layer.

    Args:
        norm: with affine parameters and running statistics, which are taken over.
        group: of the stage.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, group: Group) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self._group = group

    def forward(self, z: Tensor) -> Tensor:
        if not self.training:
            y: Tensor = super().forward(z)
            return y
        return self.with_mean_square(z)[0]

    def with_mean_square(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As `BatchNorm2d.with_mean_square`, over the rows of all replicas."""
        if not self.training:
            return super().with_mean_square(z)
        momentum = self._count_batch()
        y, mean_square = _Synchronised.apply(  # type: ignore[no-untyped-call]
            z, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps, self._group
        )
        return y, mean_square

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Synchronised(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        wide = _widened(z)
        var, mean = torch.var_mean(wide, _dims(z), correction=0)
        count = z.numel() // z.size(1)
        # one sum: each replica fills its own row of a table of zeros
        table = wide.new_zeros(group.num_replicas, 2 * z.size(1) + 1)
        table[group.replica] = torch.cat([mean, var, mean.new_tensor([float(count)])])
        counts = group.add_up(table)[:, -1:]
        means, variances = table[:, :-1].chunk(2, dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        if float(total) <= 1:
            raise ValueError("Expected more than 1 value per channel when training, over all replicas")
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (total / (total - 1)), momentum)
        invstd = (var + eps).rsqrt()
        y = ((wide - _column(mean, z)) * _column(invstd * weight, z) + _column(bias, z)).to(z.dtype)
        mean_square = mean_square_of(weight, bias, invstd, eps)
        ctx.save_for_backward(z, weight, bias, mean, invstd, total)
        ctx.eps, ctx.group = eps, group
        ctx.set_materialize_grads(False)
        return y, mean_square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_cost: Tensor | None) -> tuple[Tensor | None, ...]:
        """x = (z - mean) * invstd; d gamma and d beta are of this replica's rows, for gradients are added up later:

        d gamma = sum(dy * x)     d beta = sum(dy)     d z = gamma * invstd * (dy - (S(dy) + x * S(dy * x)) / n)

        S: sum over the rows of all replicas. The cost's terms are `cost_gradients`: its g comes weighted by
        this replica's share n_r / n of the rows, so g / n_r is that of all rows.
        """
        z, weight, bias, mean, invstd, total = ctx.saved_tensors
        eps: float = ctx.eps
        centred = _widened(z) - _column(mean, z)
        grad_z, grad_weight, grad_bias = None, None, None
        if grad_y is not None:
            grad_y = _widened(grad_y)
            x = centred * _column(invstd, z)
            grad_bias, grad_weight = grad_y.sum(_dims(z)), (grad_y * x).sum(_dims(z))
            sums = ctx.group.add_up(torch.cat([grad_bias, grad_weight])) / total
            of_dy, of_dy_x = sums.chunk(2)
            grad_z = (grad_y - _column(of_dy, z) - x * _column(of_dy_x, z)) * _column(weight * invstd, z)
        if grad_cost is not None:
            costs = cost_gradients(grad_cost, centred, weight, bias, invstd, eps)
            grad_z, grad_weight, grad_bias = (
                cost if grad is None else grad + cost
                for grad, cost in zip((grad_z, grad_weight, grad_bias), costs, strict=True)
            )
        return None if grad_z is None else grad_z.to(z.dtype), grad_weight, grad_bias, None, None, None, None, None


def _widened(x: Tensor) -> Tensor:
    """Statistics are float32 at least, also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dims(z: Tensor) -> list[int]:
    return [dim for dim in range(z.ndim) if dim != 1]


def _column(values: Tensor, z: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (z.ndim - 2))
