"""Ordinary batch norm in two heavy passes; no file in here knows what Batch Renormalization is for.

Every backend is a module with the same two functions. Consecutive groups of ``size`` samples of x, ``(N, C, *spatial)``
are normalised by themselves (the last may be smaller); with ``size >= N`` there is one group. A statistic is a vector
``(C,)`` where there is one group and ``(G, C)`` where there are more.

``moments(x, eps, size, mask) -> (mean, var, std)``
    biased, in float32 (float64 for float64 x); ``std = sqrt(var + eps)``.
``affine(x, moments, eps, scale, shift, weight, bias, size, residual, activation) -> y``
    ``y = activation(weight * ((x - mean) / std * scale + shift) + bias + residual)``, differentiable in x (through
    mean and std as well, as in batch norm), weight and bias, ``(C,)``, and residual, like x. Scale and shift, shaped
    like the statistics, are constants. The activation is "relu" or None.
"""

from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]
