"""Ordinary batch norm in two heavy passes; no file in here knows what Batch Renormalization is for.

Every backend is a module with the same two functions. Consecutive groups of ``size`` samples of x, ``(N, C, *spatial)``
are normalised by themselves (the last may be smaller); with ``size >= N`` there is one group. A statistic is a vector
``(C,)`` where there is one group and ``(G, C)`` where there are more.

``moments(x, eps, size, mask) -> (mean, var, std)``
    biased, in float32 (float64 for float64 x); ``std = sqrt(var + eps)``.
``affine(x, moments, eps, scale, shift, weight, bias, size, residual, activation, shared, moving) -> y``
    ``y = activation(weight * ((x - mean) / std * scale + shift) + bias + residual)``, differentiable in x (through
    mean and std as well, as in batch norm), weight and bias, ``(C,)``, and residual, like x. Scale and shift, shaped
    like the statistics, are constants. The activation is "relu" or None. With `shared`
    the moments are those of a whole minibatch of which x is one replica's share, and so is their part of the gradient.
    With `moving` the gradient of x subtracts other means than the group's own (`..moving`); `aten` cannot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..replicas import Replicas, add_up

Moments = tuple[Tensor, Tensor, Tensor]


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Shared(NamedTuple):
    """Who shares the moments."""

    replicas: Replicas
    total: Tensor  # 0-d float64, all their values per channel

    def coefficients(self, sum_dy: Tensor, sum_dy_x_hat: Tensor, a: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """b and c of the gradient ``a * dy + (x - mean) * b + c`` from this replica's sums; a is weight * scale / std.

        By way of d loss / d mean and d loss / d var, as `replicas.merge` has it: another replica may run another
        backend.
        """
        mean_grad, var_grad = -a * sum_dy, -a * sum_dy_x_hat / (2 * std)
        mean_grad, var_grad = (
            (add_up(torch.cat([mean_grad, var_grad]), self.replicas) / self.total).to(a.dtype).chunk(2)
        )
        return 2 * var_grad, mean_grad


def in_order(x: Tensor) -> Tensor:
    """With the elements in memory as NC* or N*C, whichever is nearer, and as they are."""
    if x.is_neg():
        x = x.resolve_neg()
    # `suggest_memory_format` is Python, and takes longer than asking for the two usual orders.
    last = _CHANNELS_LAST.get(x.ndim)
    if x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last)):
        return x
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def as_laid_out(t: Tensor, x: Tensor) -> Tensor:
    """With its elements in memory where those of x are, which is `in_order`."""
    return in_order(t) if t.stride() == x.stride() else torch.empty_like(x).copy_(t)
