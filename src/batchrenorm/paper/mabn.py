"""Moving Average Batch Normalization (Yan et al. 2020), the nearest relative, as an arm of the experiments.

J. Yan, R. Wan, X. Zhang, W. Zhang, Y. Wei, J. Sun: Towards Stabilizing Batch Statistics in Backward Propagation of
Batch Normalization, ICLR 2020, arXiv:2001.06838. Written from its rule; the constants that the paper leaves open are
those of the authors' program for ImageNet (megvii-model/MABN, cls/networks/MABN.py).

Per channel, x in group t, E_t a mean over the values of the group, W_t over the groups t - G + 1 .. t, where G groups
are a minibatch's worth and those of the step before count:

    chi2 = W_t E_t x^2          z = x / sqrt(chi2 + eps)
    r    = clip(sqrt(chi2 + eps) / sqrt(running_var + eps), 1/5, 5), 1 in the first 99 steps, constant in the backward
    y    = weight r z + bias
    g    = weight r dL/dy       dL/dx = (g - z W_t E_t[g z]) / sqrt(chi2 + eps)
    running_var += 0.02 (mean of chi2 over the step's groups - running_var), after its use; in the first step all of it

In the first step, before which there are no groups, the windows are the group alone. Inference:
y = weight x / sqrt(running_var + eps) + bias. No mean is subtracted; instead each output channel's weights in the
convolution before have theirs subtracted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_R_MAX, _R_FROM, _MOMENTUM = 5.0, 99, 0.02


class Mabn(nn.Module):
    """The layer. Its weights' gradients are taken once for each forward, in its order.

    Args:
        num_features: C.
        eps: added to the second moment, under the root.
        microbatch_size: samples of a group; None is the minibatch.
        window: G, groups of which the moments are taken.
    """

    running_mean: Tensor  # 0 and never moved: so its averages are read and written as the other layers'
    running_var: Tensor
    num_batches_tracked: Tensor
    before_x2: Tensor
    before_gz: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, microbatch_size: int | None = None, window: int = 1
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = _MOMENTUM
        self.microbatch_size = microbatch_size
        self.window = window
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # Of the G groups up to the last one seen.
        self.register_buffer("before_x2", torch.zeros(window, num_features))
        self.register_buffer("before_gz", torch.zeros(window, num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, ``(N, C)`` or ``(N, C, *)``; in training move the averages afterwards."""
        channels = (-1, *[1] * (x.ndim - 2))
        if self.training:
            groups = x.unflatten(0, (-1, self.microbatch_size or len(x)))
            h = _Normalize.apply(groups, self).flatten(0, 1)
        else:
            h = x / (self.running_var + self.eps).sqrt().view(channels)
        return h * self.weight.view(channels) + self.bias.view(channels)


class _Normalize(torch.autograd.Function):
    """r z of ``(groups, samples, C, *)``; weight and bias, which are outside, make no difference to the formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Mabn) -> Tensor:
        # Under autocast x may be of half precision, which moments never are.
        x = x.to(layer.running_var.dtype)
        first, ramped = layer.num_batches_tracked == 0, layer.num_batches_tracked >= _R_FROM
        chi2, layer.before_x2 = _window(layer.before_x2, _mean(x.square()), first)
        root = (chi2 + layer.eps).sqrt()
        r = (root / (layer.running_var + layer.eps).sqrt()).clamp(1 / _R_MAX, _R_MAX)
        r = torch.where(ramped, r, 1.0)
        z = x / _broadcast(root, x)
        mean = chi2.mean(0)
        layer.running_var = torch.where(first, mean, torch.lerp(layer.running_var, mean, layer.momentum))
        layer.num_batches_tracked = layer.num_batches_tracked + 1
        ctx.save_for_backward(z, root, r, first)
        ctx.layer = layer
        return z * _broadcast(r, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, root, r, first = ctx.saved_tensors
        layer = ctx.layer
        g = grad * _broadcast(r, z)
        gz, layer.before_gz = _window(layer.before_gz, _mean(g * z), first)
        return (g - z * _broadcast(gz, z)) / _broadcast(root, z), None


def _mean(x: Tensor) -> Tensor:
    return x.mean([1, *range(3, x.ndim)])


def _broadcast(of_groups: Tensor, x: Tensor) -> Tensor:
    return of_groups[:, None].unflatten(2, (-1, *[1] * (x.ndim - 3)))


def _window(before: Tensor, now: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Of each group the mean over the G up to it, and the last G groups for the next step."""
    size = len(before)
    groups = torch.cat([before, now])
    mean = groups.unfold(0, size, 1)[1:].mean(-1)
    return torch.where(first, now, mean), groups[len(groups) - size :].clone()


class CentredLinear(nn.Linear):
    """A linear layer of weights less their mean over the inputs of each output."""

    def forward(self, x: Tensor) -> Tensor:
        """``x (W - mean W)^T + bias``."""
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class CentredConv2d(nn.Conv2d):
    """A convolution of weights less their mean over the inputs of each output."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x with ``W - mean W``, plus bias."""
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


_CENTRED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CentredLinear, nn.Conv2d: CentredConv2d}


def centre_weights(model: nn.Module) -> None:
    """Let the linear layer or convolution directly before each `Mabn` use centred weights; in place.

    The class of the layer changes and nothing else: the parameters, their names and their order stay, as arms share
    them.

    Args:
        model: whose modules are listed in the order in which they are used, as in the nets of the presets.
    """
    before: nn.Module | None = None
    for layer in model.modules():
        if isinstance(layer, Mabn) and before is not None and type(before) in _CENTRED:
            before.__class__ = _CENTRED[type(before)]
        if not list(layer.children()):
            before = layer
