"""ATen's own batch-norm primitives: eager CPU, and CUDA without Triton.

The forward is two passes, statistics and transform, exactly those of `F.batch_norm(training=True)`; but between them
stands the caller, who chooses scale and shift from the statistics. So the transform is the *inference* kernel, fed with
the minibatch's own moments, and the backward is batch norm's with weight times scale for the weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import Moments

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def moments(x: Tensor, eps: float, mask: Tensor | None = None) -> Moments:
    if mask is not None:
        raise ValueError("expected mask=None with backend='aten', got a mask; use backend=None or 'decomposed'")
    x = x.detach()  # the derivative is in _Affine; the operator has none
    if x.dtype in (torch.float32, torch.float64):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        # For half x the CPU kernel rounds its float32 statistics to half, unless averages of float32 are there.
        unused = x.new_zeros(2, x.shape[1], dtype=torch.float32)
        mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return mean, var, (var + as_tensor(eps)).sqrt_()


def affine(
    x: Tensor,
    moments: Moments,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if x.numel() > _SMALL:
        return _Affine.apply(x, weight, bias, (*moments, eps, scale, shift))
    w, b = _effective_affine(scale, shift, weight, bias)
    return torch.batch_norm(x, w, b, None, None, True, 0.0, eps, False)


def _effective_affine(
    scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    w, b = scale, shift
    if weight is not None:
        w = scale * weight
        b = shift * weight if bias is None else torch.addcmul(bias, shift, weight)
    elif bias is not None:
        b = shift + bias
    return w.flatten(), b.flatten()


# Below this many elements a second statistics pass costs less than an autograd node written in Python.
_SMALL = 2**15


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: tuple[Any, ...]) -> Tensor:
        mean, var, std, eps, scale, shift = constants
        w, b = _effective_affine(scale, shift, weight, bias)
        y = torch.native_batch_norm(x, w, b, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(x)
        # (K,)-vectors that nobody else writes or differentiates; as attributes they cost no packing and unpacking.
        ctx.constants = (w, mean, std, eps, scale, shift)
        ctx.dtypes = (weight is not None and weight.dtype, bias is not None and bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are enabled in here only under create_graph; the guard costs as much as an operator.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    w, mean, std, eps, scale, shift = ctx.constants
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    sums = need_weight or need_bias
    gx, gw, gb = _batch_norm_backward(
        grad, x, w, None, None, mean, std.reciprocal(), True, eps, [need_x, need_weight, sums]
    )
    if sums and scale.ndim == 2:
        gw, gb = gw if gw is None else gw.view_as(scale), gb.view_as(scale)
    if need_weight:
        # y = weight * (x_hat * scale + shift) + bias; gw is sum(grad * x_hat), gb sum(grad).
        gw = (gw * scale).addcmul_(gb, shift)
        gw = (gw if scale.ndim == 1 else gw.sum(0)).to(ctx.dtypes[0])
    if need_bias:
        gb = (gb if scale.ndim == 1 else gb.sum(0)).to(ctx.dtypes[1])
    return gx, gw if need_weight else None, gb if need_bias else None, None


_gradients_once = once_differentiable(_gradients)


@functools.lru_cache(maxsize=64)
def as_tensor(number: float) -> Tensor:
    """0-d float64 of a setting: arithmetic with it takes half the time of arithmetic with a Python number."""
    return torch.tensor(number, dtype=torch.float64)


AffineBackward: type = _Affine._backward_cls
"""The class of this backend's nodes in autograd's graph."""
