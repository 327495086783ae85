"""Plain torch operators: for torch.compile, torch.func, torch.export, masks, double backward, and any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..moving import Moving, zeros_and_factor
from ..replicas import merge
from . import Moments, Shared


def moments(x: Tensor, eps: float, size: int, mask: Tensor | None = None) -> Moments:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if mask is not None:
        mask = mask.unsqueeze(1).expand_as(x)
    if x.numel() == 0:  # no values; but a node in autograd's graph, since other replicas may wait in its backward
        mean, var = (x.sum([0, *range(2, x.ndim)]) for _ in range(2))
    elif size >= x.shape[0]:
        mean, var = _mean_var(x, mask, [0, *range(2, x.ndim)])
    elif x.shape[0] % size == 0:
        mean, var = _mean_var(*_grouped(size, x, mask), [1, *range(3, x.ndim + 1)])
    else:
        whole = x.shape[0] // size * size
        groups = _mean_var(
            *_grouped(size, x[:whole], None if mask is None else mask[:whole]), [1, *range(3, x.ndim + 1)]
        )
        last = _mean_var(x[whole:], None if mask is None else mask[whole:], [0, *range(2, x.ndim)])
        mean, var = (torch.cat([v, w.unsqueeze(0)]) for v, w in zip(groups, last))
    return mean, var, (var + eps).sqrt()


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
    shared: Shared | None = None,  # autograd goes through the moments by itself
    moving: Moving | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    mean, _, std = moments
    added: tuple[Tensor, Tensor, Tensor] | None = None
    if moving is not None:
        count = _count(x, size, mask, mean) if shared is None else shared.total.to(mean.dtype)
        added = zeros_and_factor(moving, moments, scale, shift, weight, count, eps, shared is not None)
        mean, std = mean.detach(), std.detach()
    scale = scale / std
    if weight is not None:
        weight = weight.to(mean.dtype)
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias.to(mean.dtype)
    through = None
    if added is not None:
        through = (x.to(mean.dtype) - x.detach().to(mean.dtype)) * _like(x, (scale * added[2]).detach(), size)
        scale, shift, x = scale + added[0], shift + added[1], x.detach()
    # x - mean before the product: with x * scale + (shift - mean * scale) the gradient of scale would be a difference
    # of two sums of size mean/std, which loses every digit at an offset of 1e4.
    y = (x.to(mean.dtype) - _like(x, mean, size)) * _like(x, scale, size) + _like(x, shift, size)
    if through is not None:  # 0, but the way of dy to x
        y = y + through
    if residual is not None:
        y = y + residual.to(mean.dtype)
    return (y if activation is None else y.relu()).to(x.dtype)


def gradients(
    needs: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    output: Tensor | None,
    relu: bool,
    shared: Shared | None = None,
) -> tuple[Tensor | None, ...]:
    """Those of `affine` of x, weight, bias and residual, where needed, and differentiable again, as a node is not.

    Args:
        output: of the ReLU, where a residual was added before it.
    """
    found = moments(x, eps, size)
    if shared is not None:
        mean, var, *_ = merge(*found[:2], x.numel() // x.shape[1], True, shared.replicas)
        found = mean, var, (var + eps).sqrt()
    y = affine(x, found, eps, scale, shift, weight, bias, size)
    if relu:
        grad = torch.where((y if output is None else output) <= 0, 0, grad)
    wanted = [v for v, need in zip((x, weight, bias), needs) if need and v is not None]
    gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
    return *(next(gradients) if need else None for need in needs[:3]), grad if needs[3] else None


def _mean_var(x: Tensor, mask: Tensor | None, dims: list[int]) -> tuple[Tensor, Tensor]:
    if mask is None:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / count
    deviation = torch.where(mask, x - mean, 0)
    return mean.squeeze(dims), ((deviation * deviation).sum(dims, keepdim=True) / count).squeeze(dims)


def _count(x: Tensor, size: int, mask: Tensor | None, like: Tensor) -> Tensor:
    """Values of each group, as they multiply a statistic: 0-d or ``(G, 1)``."""
    N = x.shape[0]
    positions = math.prod(x.shape[2:])
    if mask is not None:
        count = torch.stack([part.sum() for part in mask.split(size)]).to(like.dtype)
        return count[0] if like.ndim == 1 else count[:, None]
    if like.ndim == 1:
        return like.new_full((), N * positions)
    whole = like.new_full((N // size, 1), size * positions)
    return whole if N % size == 0 else torch.cat([whole, like.new_full((1, 1), N % size * positions)])


def _grouped(size: int, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.unflatten(0, (-1, size)), None if mask is None else mask.unflatten(0, (-1, size))


def _like(x: Tensor, vector: Tensor, size: int) -> Tensor:
    spatial = [1] * (x.ndim - 2)
    if vector.ndim == 1:
        return vector.view(1, -1, *spatial)
    # (G, C) -> (N, C): every sample has its group's
    samples = vector.unsqueeze(1).expand(-1, size, -1).reshape(-1, vector.shape[1])
    return samples[: x.shape[0]].view(x.shape[0], -1, *spatial)
