"""The paper on (C,)-vectors on a GPU: `correction.c` once more, as functions that a kernel of Triton can call.

`correction.py` does the same with operators of torch, each of which takes longer to launch than such a vector takes to
compute. Imported only where Triton runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clip_limits(t, r_max, d_max, warmup, d_full, r_full):  # type: ignore[no-untyped-def]
    """`ClipSchedule.__call__` for the training forward that follows t finished ones: r's lower limit, upper, d's."""
    upper = 1.0 + _ramp(t, warmup, r_full, tl.full([], r_max, tl.float64) - 1.0)
    d = _ramp(t, warmup, d_full, tl.full([], d_max, tl.float64))
    return (1.0 / upper).to(tl.float32), upper.to(tl.float32), d.to(tl.float32)


@triton.jit
def _ramp(t, start, end, height):  # type: ignore[no-untyped-def]
    if end > start:
        part = (t - start).to(tl.float64) / tl.full([], end - start, tl.float64)
    else:
        part = (t >= end).to(tl.float64)
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    return tl.where(part > 0.0, part * height, 0.0)  # and not 0 * inf where there is no limit


@triton.jit
def r_d(mu_B, sigma_B, mu, sigma, r_low, r_high, d_high):  # type: ignore[no-untyped-def]
    r = _clip(tl.div_rn(sigma_B, sigma), r_low, r_high)
    d = _clip(tl.div_rn(mu_B - mu, sigma), -d_high, d_high)
    return r, d


@triton.jit
def moved(mean, std, mu, sigma, var, alpha, eps):  # type: ignore[no-untyped-def]
    """The running mean and variance after the step."""
    new_mean, new_sigma = _lerp(mu, mean, alpha), _lerp(sigma, std, alpha)
    # sigma² - eps, but never below 0, where rounding could take it if the channel is constant.
    new_var = tl.maximum(new_sigma * new_sigma - eps, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # A channel that overflowed must not poison the averages: a gradient scaler will skip this step.
    finite = (tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf"))
    return tl.where(finite, new_mean, mu), tl.where(finite, new_var, var)


@triton.jit
def _clip(v, low, high):  # type: ignore[no-untyped-def]
    # Comparisons, and not minimum and maximum: a NaN stays one.
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def _lerp(start, end, weight):  # type: ignore[no-untyped-def]
    # torch.lerp's two forms: with weight 1 the second is `end` to the last bit.
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))
