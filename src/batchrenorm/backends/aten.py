"""ATen's own batch-norm primitives: eager CPU without `native` or in float64, and CUDA without Triton.

The forward is two passes, statistics and transform, exactly those of `F.batch_norm(training=True)`; but between them
stands the caller, who chooses scale and shift from the statistics. So the transform is the *inference* kernel, fed with
the minibatch's own moments, and the backward is batch norm's with weight times scale for the weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import Moments, Shared, decomposed

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default

# Up to this many elements a second statistics pass costs less than an autograd node written in Python.
_SMALL = 2**15
# Groups of fewer elements are folded into channels, which copies them; a pass for each costs as much as copying that.
_SLICE = 2**13


def moments(x: Tensor, eps: float, size: int, mask: Tensor | None = None) -> Moments:
    if mask is not None:
        raise ValueError("expected mask=None with backend='aten', got a mask; use backend=None or 'decomposed'")
    x = x.detach()  # the derivative is in _Affine; the operators have none
    if size >= x.shape[0]:
        mean, var = _mean_var(x)
    elif _folds(x, size):
        mean, var = (v.view(-1, x.shape[1]) for v in _mean_var(_fold(x, size)))
    else:
        mean, var = (torch.stack(vectors) for vectors in zip(*map(_mean_var, x.split(size))))
    return mean, var, (var + as_tensor(eps)).sqrt_()


def affine(
    x: Tensor,
    moments: Moments,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    residual: Tensor | None = None,
    activation: str | None = None,
    shared: Shared | None = None,
) -> Tensor:
    fold = size < x.shape[0] and _folds(x, size)
    if (fold or size >= x.shape[0]) and x.numel() <= _SMALL and shared is None:
        w, b = (v.flatten() for v in _effective_affine(scale, shift, weight, bias))
        y = torch.batch_norm(_fold(x, size) if fold else x, w, b, None, None, True, 0.0, eps, False)
        y = _unfold(y, x) if fold else y
        y = y if residual is None else y + residual
        return y if activation is None else y.relu()
    return _Affine.apply(x, weight, bias, residual, (*moments, eps, scale, shift, size, activation is not None, shared))


def _mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype in (torch.float32, torch.float64):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # For half x the CPU kernel rounds its float32 statistics to half, unless averages of float32 are there.
    unused = x.new_zeros(2, x.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)


def _effective_affine(
    scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return scale, shift if bias is None else shift + bias
    return scale * weight, shift * weight if bias is None else torch.addcmul(bias, shift, weight)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        constants: tuple[Any, ...],
    ) -> Tensor:
        mean, var, _, eps, scale, shift, size, relu, shared = constants
        w, b = _effective_affine(scale, shift, weight, bias)
        y = _normalized(x, w, b, mean, var, eps, size)
        if residual is not None:
            y += residual
        if relu:
            y.relu_()
        # With a residual the ReLU's mask cannot be had from x; the output is kept by whatever takes it anyway.
        ctx.save_for_backward(x, weight, bias, y if relu and residual is not None else None)
        # Vectors that nobody else writes or differentiates; as attributes they cost no packing and unpacking.
        ctx.constants = (mean, var, eps, scale, shift, size, relu, shared, w, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        mean, var, eps, scale, shift, size, relu, shared, w, b = ctx.constants
        need_x, need_weight, need_bias, need_residual, _ = needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # under create_graph: this gradient may be differentiated again
            vectors = scale, shift, weight, bias
            return *decomposed.gradients(needs, grad, x, eps, *vectors, size, y, relu, shared), None

        if relu:
            grad = torch.ops.aten.threshold_backward(
                grad, _normalized(x, w, b, mean, var, eps, size) if y is None else y, 0
            )
        if grad.stride() != x.stride() and x.element_size() == 2:
            # Where the layouts differ ATen's slow way adds up in half: dbeta of 160 values off by 4 %.
            grad = torch.empty_like(x).copy_(grad)
        # As batch norm has it, to the last bit: MKL's square root, which gave std, may be off by one.
        invstd = (var + as_tensor(eps)).rsqrt()
        sums = need_weight or need_bias
        mask = [need_x, need_weight, sums]
        if shared is not None:
            ones = torch.ones_like(mean)
            _, gw, gb = _batch_norm_backward(
                grad, x, ones, None, None, mean, invstd, True, eps, [False, need_x or need_weight, need_x or sums]
            )
            gx = _shared_gradient(grad, x, mean, invstd, w, gb, gw, shared) if need_x else None
        elif w.ndim == 1:
            gx, gw, gb = _batch_norm_backward(grad, x, w, None, None, mean, invstd, True, eps, mask)
        else:
            gx = torch.empty_like(x) if need_x else None
            gws, gbs = [], []
            groups = zip(grad.split(size), x.split(size), w, mean, invstd)
            for g, (grad_g, x_g, w_g, mean_g, invstd_g) in enumerate(groups):
                gx_g, gw_g, gb_g = _batch_norm_backward(grad_g, x_g, w_g, None, None, mean_g, invstd_g, True, eps, mask)
                if gx is not None:
                    gx[g * size : (g + 1) * size] = gx_g
                gws.append(gw_g)
                gbs.append(gb_g)
            gw, gb = torch.stack(gws) if need_weight else None, torch.stack(gbs) if sums else None
        if need_weight:
            # y = weight * (x_hat * scale + shift) + bias; gw is sum(grad * x_hat), gb sum(grad).
            gw = (gw * scale).addcmul_(gb, shift)
            gw = (gw if gw.ndim == 1 else gw.sum(0)).to(weight.dtype)
        if need_bias:
            gb = (gb if gb.ndim == 1 else gb.sum(0)).to(bias.dtype)
        return gx, gw if need_weight else None, gb if need_bias else None, grad if need_residual else None, None


def _shared_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    w: Tensor,
    sum_dy: Tensor,
    sum_dy_x_hat: Tensor,
    shared: Shared,
) -> Tensor:
    a = w.to(mean.dtype) * invstd
    b, c = shared.coefficients(sum_dy, sum_dy_x_hat, a, invstd.reciprocal())
    mean, a, b, c = (v.view(-1, *[1] * (x.ndim - 2)) for v in (mean, a, b, c))
    return (grad.to(mean.dtype) * a + ((x.to(mean.dtype) - mean) * b + c)).to(x.dtype)


def _normalized(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float, size: int) -> Tensor:
    if w.ndim == 1:
        # What is neither planes nor rows in memory takes a slow way, where inference has MKL's square root, which may
        # be off by a bit, and training not; its statistics are these once more.
        training = not x.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
        return torch.native_batch_norm(
            x, w, b, None if training else mean, None if training else var, training, 0.0, eps
        )[0]
    y = torch.empty_like(x)
    unused = mean.new_empty(0), mean.new_empty(0)
    for x_g, y_g, *vectors in zip(x.split(size), y.split(size), w, b, mean, var):
        torch.native_batch_norm(x_g, *vectors, False, 0.0, eps, out=(y_g, *unused))  # type: ignore
    return y


# Folding: groups become channels, (G*m, C, *) -> (m, G*C, *), and everything between is batch norm of more channels.


def _folds(x: Tensor, size: int) -> bool:
    return x.shape[0] % size == 0 and x.numel() // x.shape[0] * size <= _SLICE and x.numel() <= _SMALL


def _fold(x: Tensor, size: int) -> Tensor:
    N, C, *spatial = x.shape
    return x.reshape(N // size, size, C, *spatial).transpose(0, 1).reshape(size, N // size * C, *spatial)


def _unfold(y: Tensor, x: Tensor) -> Tensor:
    N, C, *spatial = x.shape
    size = y.shape[0]
    y = y.view(size, N // size, C, *spatial).transpose(0, 1).reshape(x.shape)
    return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


@functools.lru_cache(maxsize=64, typed=True)
def as_tensor(number: float) -> Tensor:
    """0-d float64 or int64 of a setting: arithmetic with it takes half the time of arithmetic with a Python number."""
    dtype = torch.int64 if isinstance(number, int) else torch.float64
    return torch.tensor(number, dtype=dtype, device="cpu")  # whatever device is the context of the first call


AffineBackward: type = _Affine._backward_cls
"""The class of this backend's nodes in autograd's graph."""
