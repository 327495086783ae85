"""Ordinary batch norm in two heavy passes; no file in here knows what Batch Renormalization is for.

Every backend is a module with the same two functions, on x of shape ``(M, K, *spatial)``:

``moments(x, eps, mask) -> (mean, var, std)``
    biased, per channel, ``(K,)``, in float32 (float64 for float64 x); ``std = sqrt(var + eps)``.
``affine(x, moments, eps, scale, shift, weight, bias) -> y``
    ``y = weight * ((x - mean) / std * scale + shift) + bias``, differentiable in x (through mean and std as well, as in
    batch norm), weight and bias; scale and shift are constants. They are ``(C,)``, or ``(G, C)`` with ``K = G * C``:
    the G groups of channels have one weight and bias ``(C,)`` in common.
"""

from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]
