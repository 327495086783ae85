"""Ordinary batch norm in two heavy passes; no file in here knows what Batch Renormalization is for.

Every backend is a module with the same two functions, on x of shape ``(M, K, *spatial)``:

``moments(x, mask) -> (mean, var)``
    biased, per channel, ``(K,)``, in float32 (float64 for float64 x).
``affine(x, mean, var, eps, scale, shift, weight, bias) -> y``
    ``y = weight * ((x - mean) / sqrt(var + eps) * scale + shift) + bias``, differentiable in x (through mean and var as
    well, as in batch norm), weight and bias; scale and shift are constants.
"""
