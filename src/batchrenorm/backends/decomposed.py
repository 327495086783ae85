"""Plain torch operators: for torch.compile, torch.func, torch.export, masks, double backward, and any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Moments


def moments(x: Tensor, eps: float, mask: Tensor | None = None) -> Moments:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dims = [0, *range(2, x.ndim)]
    if mask is None:
        var, mean = torch.var_mean(x, dims, correction=0)
    else:
        count = mask.sum(dims).clamp(min=1)
        mean = torch.where(mask, x, 0).sum(dims) / count
        deviation = torch.where(mask, x - _like(x, mean), 0)
        var = (deviation * deviation).sum(dims) / count
    return mean, var, (var + eps).sqrt()


def affine(
    x: Tensor,
    moments: Moments,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    mean, _, std = moments
    if weight is not None:
        weight = weight.to(mean.dtype)
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias.to(mean.dtype)
    # x - mean before the product: with x * scale + (shift - mean * scale) the gradient of scale would be a difference
    # of two sums of size mean/std, which loses every digit at an offset of 1e4.
    y = (x.to(mean.dtype) - _like(x, mean)) * _like(x, scale.flatten() / std) + _like(x, shift.flatten())
    return y.to(x.dtype)


def _like(x: Tensor, vector: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.ndim - 2))
