"""Algorithm 1 of the paper as printed: the truth that the tests, and readers, start from.

    S. Ioffe. Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models. 2017.
    https://arxiv.org/abs/1702.03275

Nothing here is fast and nothing is hidden: one line of code for one line of the paper, in the paper's letters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_renorm(
    x: Tensor,
    mu: Tensor,
    sigma: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    alpha: float = 0.01,
    eps: float = 1e-5,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One training step of Batch Renormalization, pure: nothing is modified.

    ``y = gamma * ((x - mu_B) / sigma_B * r + d) + beta``, with r, d constants under the gradient.

    Args:
        x: ``(N, C)`` or ``(N, C, *spatial)``, floating point; statistics are over all but the channel dimension.
        mu: ``(C,)``, moving mean before this step.
        sigma: ``(C,)``, moving standard deviation before this step; epsilon is inside it. ``sigma = sqrt(running_var +
            eps)``.
        gamma: ``(C,)`` or None for 1.
        beta: ``(C,)`` or None for 0.
        alpha: update rate of the moving averages, the weight of the new value.
        eps: added to the variance, under the root.
        r_max: r is clipped to ``[1/r_max, r_max]``.
        d_max: d is clipped to ``[-d_max, d_max]``.

    Returns:
        ``(y, new_mean, new_std)``: y like x, and the ``(C,)`` averages after the step. Inference is
        ``y = gamma * (x - mean) / std + beta``; no epsilon is added there.

    Examples:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> y, mean, std = batch_renorm(x, mu=torch.zeros(1), sigma=torch.ones(1), alpha=0.1)
        >>> y.flatten().tolist(), round(mean.item(), 4), round(std.item(), 4)  # unclipped: y = (x - mu) / sigma
        ([1.0, 3.0], 0.2, 1.0)

    Source: Algorithm 1.
    """
    batch = [0, *range(2, x.ndim)]
    channel = (1, -1) + (1,) * (x.ndim - 2)

    mu_B = x.mean(batch)
    sigma_B = torch.sqrt(eps + ((x - mu_B.view(channel)) ** 2).mean(batch))

    with torch.no_grad():  # the paper's stop_gradient
        r = torch.clip(sigma_B / sigma, 1 / r_max, r_max)  # type: ignore[arg-type]
        d = torch.clip((mu_B - mu) / sigma, -d_max, d_max)  # type: ignore[arg-type]

    x_hat = (x - mu_B.view(channel)) / sigma_B.view(channel) * r.view(channel) + d.view(channel)
    y = x_hat
    if gamma is not None:
        y = gamma.view(channel) * y
    if beta is not None:
        y = y + beta.view(channel)

    with torch.no_grad():
        new_mean = mu + alpha * (mu_B - mu)
        new_std = sigma + alpha * (sigma_B - sigma)
    return y, new_mean, new_std
