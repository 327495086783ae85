"""ATen's own batch-norm primitives: eager CPU, and CUDA without Triton.

The forward is two passes, statistics and transform, exactly those of `F.batch_norm(training=True)`; but between them
stands the caller, who chooses scale and shift from the statistics. One more read of x would cost what the whole of batch
norm's backward reduction costs, so the transform is the *inference* kernel fed with the minibatch's own moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        raise ValueError("expected mask=None with backend='aten', got a mask; use backend=None or 'decomposed'")
    x = x.detach()  # the derivative is in _Affine; the operator has none
    if x.dtype in (torch.float32, torch.float64):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # For half x the CPU kernel returns its float32 statistics rounded to half, unless averages of float32 are there.
    unused = x.new_zeros(2, x.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)


def affine(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return _Affine.apply(x, weight, bias, mean, var, eps, scale, shift)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        scale: Tensor,
        shift: Tensor,
    ) -> Tensor:
        # Statistics are (K,) and scale, shift (G, C) with K = G * C: a channel's weight serves all its microbatches.
        w, b = scale, shift
        if weight is not None:
            w, b = scale * weight, shift * weight
        if bias is not None:
            b = b + bias
        w = w.flatten()
        y, _, _ = torch.native_batch_norm(x, w, b.flatten(), mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, w, mean, var, scale, shift)
        ctx.eps = eps
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mean, var, scale, shift = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
            grad,
            x,
            w,
            None,
            None,
            mean,
            1 / (var + ctx.eps).sqrt(),
            True,
            ctx.eps,
            [need_x, need_weight, need_weight or need_bias],
        )
        if need_weight:
            # y = weight * (x_hat * scale + shift) + bias, and gw = sum(grad * x_hat), gb = sum(grad)
            gb = gb.view_as(scale)
            gw = (gw.view_as(scale) * scale + gb * shift).sum(0).to(ctx.weight_dtype)
        if need_bias:
            gb = gb.view_as(scale).sum(0).to(ctx.bias_dtype)
        return gx, gw if need_weight else None, gb if need_bias else None, None, None, None, None, None


AffineBackward: type = _Affine._backward_cls  # type: ignore[attr-defined]
"""The class of this backend's nodes in autograd's graph."""
