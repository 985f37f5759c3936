"""BatchNorm at the end of a residual branch, which knows the mean square of its output without keeping it.

    mean(y ** 2) = mean_c(gamma_c ** 2 * v_c / (v_c + eps) + beta_c ** 2)     v_c: biased batch variance of channel c

TRGL then saves for its backward pass what plain greedy learning saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipetrgl.blocks import Residual
from pipetrgl.errors import ModelError


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with affine parameters and running statistics, and `with_mean_square` beside `forward`."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def with_mean_square(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """y and mean(y ** 2); y, its gradients and the running statistics are `nn.BatchNorm2d`'s bit for bit.

        Args:
            z: (N, C, H, W).
        Returns:
            y, like z, and a scalar; both are differentiable once.
        Raises:
            ValueError: training on one value per channel, which has no variance.
        """
        self._check_input_dim(z)
        if not self.training:
            y = self(z)
            return y, y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()
        if torch.compiler.is_compiling():  # the operators of _MeanSquare cannot be traced, and the compiler joins these
            v = z.float().var((0, 2, 3), correction=0)
            return self(z), (self.weight.square() * v / (v + self.eps) + self.bias.square()).mean()
        if z.numel() == z.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(z.shape)}")
        momentum = self._count_batch()
        y, mean_square = _MeanSquare.apply(  # type: ignore[no-untyped-call]
            z, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps
        )
        return y, mean_square

    def _count_batch(self) -> float:
        """Count a training batch; returns its weight in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


def close_branch(norm: BatchNorm2d, z: Tensor, identity: bool) -> tuple[Tensor, Residual]:
    """r = norm(z), the end of a residual branch, and its `Residual`: by the identity, or r itself.

    In eval mode it is r itself: there is no graph that would keep it, and the identity is one of training.
    """
    if not (identity and norm.training):
        r = norm(z)
        return r, Residual.of(r)
    r, mean_square = norm.with_mean_square(z)
    return r, Residual(value=None, mean_square=mean_square, num_features=r[0].numel())


def refuse_identity(impl: str, block: str) -> None:
    """Raise if `impl` demands the identity of a network whose branches do not end in BatchNorm.

    Args:
        impl: `TransportConfig.impl`.
        block: name of the network's first block that has a residual.
    """
    if impl == "batchnorm":
        raise ModelError(
            f"objective.transport.impl: 'batchnorm' needs residual branches that end in BatchNorm, "
            f"and that of block '{block}' does not. Allowed here: auto, autograd."
        )


def mean_square_of(weight: Tensor, bias: Tensor, invstd: Tensor, eps: float) -> Tensor:
    """mean(y ** 2) of a normalised batch, from what it was normalised with."""
    return (weight.square() * (1.0 - eps * invstd.square()) + bias.square()).mean()


def cost_gradients(
    grad_cost: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of g * mean(y ** 2) for z, gamma and beta:

    d z     = g * 2 / (M * C) * gamma ** 2 * eps * invstd ** 4 * (z - mean)      M values in each of C channels
    d gamma = g * 2 / C * gamma * (1 - eps * invstd ** 2)
    d beta  = g * 2 / C * beta

    Args:
        grad_cost: g.
        centred: z - mean, (N, C, ...); becomes d z.
    """
    scale = grad_cost * (2.0 / weight.numel())
    per_value = scale / (centred.numel() // weight.numel()) * eps * weight.square() * invstd.pow(4)
    grad_z = centred.mul_(per_value.view(1, -1, *[1] * (centred.ndim - 2)))
    return grad_z, scale * weight * (1.0 - eps * invstd.square()), scale * bias


class _MeanSquare(Function):
    """BatchNorm in train mode through the operator that `nn.BatchNorm2d` itself calls, with the cost beside it."""

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
    ) -> tuple[Tensor, Tensor]:
        # The dispatching operator, not native_batch_norm: on CUDA nn.BatchNorm2d takes cuDNN where it can.
        y, mean, invstd, reserve, kernel = torch._batch_norm_impl_index(
            z, weight, bias, running_mean, running_var, True, momentum, eps, torch.backends.cudnn.enabled
        )
        mean_square = mean_square_of(weight, bias, invstd, eps)
        ctx.save_for_backward(z, weight, bias, mean, invstd, reserve)
        ctx.kernel, ctx.eps = kernel, eps
        ctx.set_materialize_grads(False)
        return y, mean_square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_cost: Tensor | None) -> tuple[Tensor | None, ...]:
        """Plain BatchNorm's gradients, plus those of the cost."""
        z, weight, bias, mean, invstd, reserve = ctx.saved_tensors
        eps: float = ctx.eps
        grads: list[Tensor | None] = [None, None, None]
        if grad_y is not None:
            grads = list(
                torch.ops.aten._batch_norm_impl_index_backward(
                    ctx.kernel, z, grad_y, weight, None, None, mean, invstd, True, eps, [True, True, True], reserve
                )
            )
        if grad_cost is not None:
            costs = cost_gradients(grad_cost, z - mean.view(1, -1, 1, 1), weight, bias, invstd, eps)
            grads = [cost if grad is None else grad.add_(cost) for grad, cost in zip(grads, costs, strict=True)]
        return (*grads, None, None, None, None)
