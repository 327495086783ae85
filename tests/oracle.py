"""Batch Renormalization in float64 NumPy, written from the paper (Algorithm 1, its printed backward, section 4).

The second opinion on everything in `src`: no torch, no line shared with `reference.py`, and derivatives that are the
paper's equations and not an autograd's. The end of the file says how a result is measured against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Group:
    """One minibatch that is normalised by itself, as a matrix of m values (all but the channel dimension) by C."""

    rows: slice  # which samples
    x: Array  # (m, C)
    real: NDArray[np.bool_]  # (m,)
    mu_B: Array
    sigma_B: Array
    r: Array
    d: Array
    x_hat: Array  # (m, C), renormalised


@dataclass
class Step:
    """A training step: what goes out, the averages after it, and what the backward needs."""

    y: Array
    mu: Array
    sigma: Array
    gamma: Array
    groups: list[Group]


def limits(
    step: int, r_max: float = 3.0, d_max: float = 5.0, warmup: int = 5_000, d_full: int = 25_000, r_full: int = 40_000
) -> tuple[float, float]:
    """Section 4: 1 and 0 for the first steps, then "gradually relaxed to reach" their final values, linearly."""
    return (
        float(np.interp(step, [warmup, r_full], [1.0, r_max])),
        float(np.interp(step, [warmup, d_full], [0.0, d_max])),
    )


def train(
    x: Array,
    mu: Array,
    sigma: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    alpha: float = 0.01,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
    microbatch: int | list[int] | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Step:
    """x is (N, C, *spatial), mask (N, *spatial) with True for a real element; sigma has epsilon inside.

    A list of microbatches is the size of each, as where replicas cut up their shards.
    """
    x = np.asarray(x, np.float64)
    N, C = x.shape[:2]
    gamma = np.ones(C) if gamma is None else np.asarray(gamma, np.float64)
    beta = np.zeros(C) if beta is None else np.asarray(beta, np.float64)
    mask = np.ones((N, *x.shape[2:]), bool) if mask is None else mask
    size = N if microbatch is None else microbatch
    sizes = size if isinstance(size, list) else [min(size, N - first) for first in range(0, N, size)]
    groups = []
    y = np.empty_like(x)
    for g, m in enumerate(sizes):
        rows = slice(sum(sizes[:g]), sum(sizes[: g + 1]))
        values, real = _matrix(x[rows]), mask[rows].reshape(-1)
        m = max(real.sum(), 1)
        mu_B = values[real].sum(0) / m
        sigma_B = np.sqrt(eps + ((values[real] - mu_B) ** 2).sum(0) / m)
        # mu and sigma are those of before the step, for every microbatch
        r = np.clip(sigma_B / sigma, 1 / r_max, r_max)
        d = np.clip((mu_B - mu) / sigma, -d_max, d_max)
        x_hat = (values - mu_B) / sigma_B * r + d
        groups.append(Group(rows, values, real, mu_B, sigma_B, r, d, x_hat))
        y[rows] = _tensor(gamma * x_hat + beta, x[rows].shape)
    # One update for the step, so that sigma stays the average of sigma_B. A microbatch with fewer than two real
    # elements has no standard deviation to tell.
    counted = [g for g in groups if g.real.sum() > 1]
    if counted:
        mu = mu + alpha * (np.mean([g.mu_B for g in counted], axis=0) - mu)
        sigma = sigma + alpha * (np.mean([g.sigma_B for g in counted], axis=0) - sigma)
    return Step(y, mu, sigma, gamma, groups)


def backward(step: Step, dy: Array) -> tuple[Array, Array, Array]:
    """dl/dx, dl/dgamma, dl/dbeta by the equations printed under Algorithm 1, for each minibatch by itself.

    A masked element passes through the same map but is no argument of mu_B and sigma_B, so it has the first term of
    dl/dx alone.
    """
    dy = np.asarray(dy, np.float64)
    dx = np.empty_like(dy)
    dgamma, dbeta = np.zeros_like(step.gamma), np.zeros_like(step.gamma)
    for g in step.groups:
        dl_dy = _matrix(dy[g.rows])
        m = max(g.real.sum(), 1)
        dl_dx_hat = dl_dy * step.gamma
        dl_dsigma_B = (dl_dx_hat * (g.x - g.mu_B) * (-g.r / g.sigma_B**2)).sum(0)
        dl_dmu_B = (dl_dx_hat * (-g.r / g.sigma_B)).sum(0)
        through_moments = dl_dsigma_B * (g.x - g.mu_B) / (m * g.sigma_B) + dl_dmu_B / m
        dl_dx = dl_dx_hat * g.r / g.sigma_B + g.real[:, None] * through_moments
        dx[g.rows] = _tensor(dl_dx, dy[g.rows].shape)
        dgamma += (dl_dy * g.x_hat).sum(0)
        dbeta += dl_dy.sum(0)
    return dx, dgamma, dbeta


def moving_backward(
    step: Step, dy: Array, sigma: Array, mean: Array, slope: Array, own: float, rate: float = 0.3
) -> tuple[Array, Array, Array]:
    """dl/dx of docs/theory-backward.md, "regress", and its mean and slope after the step; dy is before gamma.

    sigma is that of before the step. Masked elements are no argument of the moments: nothing is subtracted from theirs.
    """
    dx, _, _ = backward(step, dy)
    left, left_h, squares, count = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean), 0
    for g in step.groups:
        dl_dy, real = _matrix(np.asarray(dy[g.rows], np.float64)), g.real[:, None]
        e = dl_dy - real * (mean + g.x_hat * slope)
        moving = step.gamma * np.minimum(g.r / g.sigma_B, 1 / sigma) * e
        dx[g.rows] = own * dx[g.rows] + (1 - own) * _tensor(moving, dx[g.rows].shape)
        left, left_h = left + e.sum(0), left_h + (e * g.x_hat).sum(0)
        squares, count = squares + (real * g.x_hat**2).sum(0), count + g.real.sum()
    return dx, mean + rate * left / count, slope + rate * left_h / np.maximum(squares, count)


def inference(x: Array, mu: Array, sigma: Array, gamma: Array | None = None, beta: Array | None = None) -> Array:
    gamma = np.ones_like(mu) if gamma is None else gamma
    beta = np.zeros_like(mu) if beta is None else beta
    return _tensor(gamma * (_matrix(x) - mu) / sigma + beta, x.shape)


def _matrix(x: Array) -> Array:
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def _tensor(matrix: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(matrix.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


# How close is close: error <= 2 x the error of the same computation done naively in that dtype, plus a slack that has
# its derivation. For float32 and float64 the issue has fixed numbers: 1e-5 and 1e-12. They are relative to the *terms*
# of a result, channel by channel, because what is summed determines the rounding: in dx, the difference between a
# cotangent and its projection, the terms may cancel altogether, and then no relative error of the difference itself
# would hold for anybody. With u the unit roundoff, a pairwise sum of n terms is off by about log2(n) u sum|terms|, and
# 1e-5 is 170 u, 1e-12 9000 u: far above rounding, far below any mistake in a formula.
RELATIVE = {"float32": 1e-5, "float64": 1e-12}


def terms(step: Step, dy: Array, beta: Array | None = None) -> dict[str, Array]:
    """(C,) size of what is added up in each result."""
    C = step.y.shape[1]
    dy_abs = np.abs(_matrix(np.asarray(dy, np.float64)))
    offset = np.zeros(C) if beta is None else np.abs(beta)
    return {
        "y": np.max(
            [np.abs(step.gamma) * (np.abs(g.x_hat).max(0) + np.abs(g.mu_B / g.sigma_B * g.r)) for g in step.groups], 0
        )
        + offset,
        "dx": np.max([g.r / g.sigma_B for g in step.groups], 0) * np.abs(step.gamma) * dy_abs.max(0),
        "dgamma": sum(
            (np.abs(_matrix(dy[g.rows])) * (np.abs(g.x_hat) + np.abs(g.d) + np.abs(g.mu_B / g.sigma_B * g.r))).sum(0)
            for g in step.groups
        ),  # type: ignore[dict-item]
        "dbeta": dy_abs.sum(0),
        "mu": np.maximum(np.abs(step.mu), step.sigma),
        "sigma": step.sigma,
    }


def error(actual: Array, truth: Array, scale: Array) -> Array:
    """(C,) largest error of each channel as a fraction of the size of its terms; NaN counts as infinite."""
    gap = np.abs(np.asarray(actual, np.float64) - truth)
    gap = gap if gap.ndim == 1 else _matrix(gap).max(0)
    return np.nan_to_num(gap / np.where(scale > 0, scale, 1.0), nan=np.inf)
