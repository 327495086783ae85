"""Plain torch operators: for torch.compile, torch.func, torch.export, masks, double backward, and any device."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dims = [0, *range(2, x.ndim)]
    if mask is None:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    count = mask.sum(dims).clamp(min=1)
    mean = torch.where(mask, x, 0).sum(dims) / count
    deviation = torch.where(mask, x - _like(x, mean), 0)
    return mean, (deviation * deviation).sum(dims) / count


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
    if weight is not None:
        weight = weight.to(mean.dtype)
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias.to(mean.dtype)
    scale = scale.flatten() / (var + eps).sqrt()
    # x - mean before the product: with x * scale + (shift - mean * scale) the gradient of scale would be a difference of
    # two sums of size mean/sigma, which loses every digit at an offset of 1e4.
    y = (x.to(mean.dtype) - _like(x, mean)) * _like(x, scale) + _like(x, shift.flatten())
    return y.to(x.dtype)


def _like(x: Tensor, vector: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.ndim - 2))
