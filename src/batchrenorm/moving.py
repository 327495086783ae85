"""The moving gradient on (C,)-vectors: a backward for tiny microbatches that remembers the steps before.

The gradient of any normalisation by mean and deviation has the form

    dx = weight * r / sigma_B * (dy - c0 - x_hat * c1)

In the paper, as in batch norm, c0 and c1 are the means of dy and dy * x_hat over the microbatch itself. With N values
that takes two of N directions away from dy, at random. Here c0 + x_hat * c1 = mean + h * slope, h = x_hat * r + d, the
regression of dy on h over the past steps, moved in every backward by what it leaves, e = dy - mean - h * slope:

    mean  += RATE * <e>            slope += RATE * <e h> / max(1, <h²>)

so that <e> = <e h> = 0 in the long run: a shift or a scale of x changes nothing, as behind the population's moments.
While the limits open the two are mixed, `own` parts of the microbatch's gradient and 1 - own of this. And its factor
is at most the population's,

    min(r / sigma_B, 1 / sigma)

which are the same where r is not clipped. Of a microbatch of nearly equal values, whose r ends at 1 / r_max, the
paper's projection leaves almost no gradient; this one would be without limit, and the mean of 1 / sigma_B of two values
is infinite. The derivation, and what it is worth, are in docs/theory-backward.md. The sums are those that the gradients
of weight and bias need anyway, so there is no other heavy pass. `moving.c` is the same in C.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .replicas import Replicas, add_up

RATE = 0.3
"""Weight of a step in mean and slope: the best on validation images of a dense and a convolutional net (LOG.md)."""


class Moving(NamedTuple):
    """State and share of the moving gradient, as a backend's backward takes them."""

    mean: Tensor  # (C,) of dy before weight, at h = 0; the layer's buffer, which the backward reads and writes
    slope: Tensor  # (C,) likewise, of dy on h
    own: float | Tensor  # share of the microbatch's own means, 1 in batch norm's warm-up and 0 once the limits are open
    sigma: Tensor | None = None  # (C,) that r was computed from; None where the kernel that computed r has it
    replicas: Replicas | None = None  # who has the same mean and slope

    def factor(self, scale: Tensor, std: Tensor) -> Tensor:
        """Of dy on its way to x, in units of weight * r / sigma_B: 1 of the own share, at most that of the other."""
        return self.own + self._rest(scale, std)

    def _rest(self, scale: Tensor, std: Tensor) -> Tensor:
        assert self.sigma is not None
        return (1.0 - self.own) * (std / (scale * self.sigma)).clamp(max=1.0)

    def part(
        self, sum_dy: Tensor, sum_dy_x_hat: Tensor, count: Tensor, scale: Tensor, shift: Tensor, std: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the backward is to take for the sums of dy and of dy * x_hat and as a factor of dy; the state moves.

        Args:
            sum_dy, sum_dy_x_hat: ``(G, C)`` or ``(C,)``, over the values of each microbatch.
            count: of these values, ``(G, 1)`` or 0-d. Of moments that all replicas share everyone has an equal part,
                since it is their sum that counts.
            scale, shift, std: like the sums; r, d and sigma_B.
            eps: in std, under the root.
        """
        mean, slope = self.mean.to(scale.dtype), self.slope.to(scale.dtype)
        rest = self._rest(scale, std)
        found = (
            self.own * sum_dy + rest * count * (mean + shift * slope),
            self.own * sum_dy_x_hat + rest * count * scale * slope,
            self.own + rest,
        )
        self.move(sum_dy, sum_dy_x_hat, count, scale, shift, std, eps)
        return found

    def move(
        self, sum_dy: Tensor, sum_dy_x_hat: Tensor, count: Tensor, scale: Tensor, shift: Tensor, std: Tensor, eps: float
    ) -> None:
        """Move mean and slope by what they leave of a step, where that is finite; arguments as for `part`."""
        mean, slope = self.mean.to(scale.dtype), self.slope.to(scale.dtype)
        # x_hat has mean 0 and mean square var / (var + eps).
        squares = count * (scale * scale * (1.0 - eps / (std * std)) + shift * shift)
        residual = sum_dy - count * (mean + shift * slope)
        residual_h = scale * sum_dy_x_hat + shift * (sum_dy - count * mean) - squares * slope
        sums = torch.stack([residual, residual_h, squares, count.expand_as(residual)])
        C = sums.shape[-1]
        sums = sums.view(4, -1, C).sum(1)
        if self.replicas is not None:
            sums = add_up(sums.flatten(), self.replicas).view(4, C)
        residual, residual_h, squares, count = sums
        count = count.clamp(min=1.0)
        new_mean = mean + RATE * residual / count
        new_slope = slope + RATE * residual_h / torch.maximum(squares, count)
        # An overflow must not poison what the next steps subtract: a gradient scaler will skip this one.
        finite = new_mean.isfinite() & new_slope.isfinite()
        self.set(torch.where(finite, new_mean, mean), torch.where(finite, new_slope, slope))

    def set(self, mean: Tensor, slope: Tensor) -> None:
        """Write the buffers."""
        # Compiled code hands its buffers to the backward as saved tensors, and would refuse a second pending backward
        # after the first has moved them. Every backward is to read the newest values, whatever forward it belongs to.
        with torch.autograd.grad_mode._unsafe_preserve_version_counter((self.mean, self.slope)):
            self.mean.copy_(mean)
            self.slope.copy_(slope)


NOT_TWICE = (
    "expected a gradient that is not differentiated again with gradient='moving', got create_graph=True; it depends on "
    "the steps before, so use gradient='microbatch' for second derivatives"
)

# For `backends.decomposed`: a node of (C,)-vectors in autograd's graph. Its outputs are zeros that the affine map adds
# to its factor and to its constant, so their gradients are sum(dy * (x - mean)) and sum(dy); from these come the
# gradients of mean and std, through which autograd goes on to x. An operator, since no compiler may look into its
# backward: that writes the buffers. Its schema keeps quiet about them: what is declared as written is refused, by the
# version of saved tensors, where two backwards of compiled code are pending.
_LIBRARY = torch.library.Library("batchrenorm", "FRAGMENT")
_ARGUMENTS = (
    "Tensor mean, Tensor std, Tensor scale, Tensor shift, Tensor? weight, Tensor count, Tensor own, Tensor sigma, "
    "Tensor gradient_mean, Tensor gradient_slope, float eps, bool together, str group, int replicas"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"moving({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(f"moving_backward(Tensor sum_dy_off, Tensor sum_dy, {_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)


def zeros_and_factor(
    moving: Moving,
    moments: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    count: Tensor,
    eps: float,
    together: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two to be added to the factor of ``x - mean`` and to the constant, and the factor of dy on its way to x.

    Args:
        moving: state.
        moments: ``(mean, var, std)``, which get the gradient.
        scale, shift: r and d.
        weight: ``(C,)`` or None.
        count: values of each microbatch, ``(G, 1)`` or 0-d.
        eps: in std.
        together: the moments, scale, shift and count are those of all replicas.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "expected no transform of torch.func with gradient='moving', got one; a backward that moves buffers "
            "is no function, so use gradient='microbatch' there"
        )
    mean, _, std = moments
    assert moving.sigma is not None
    # Of one dtype, whether it is known now or was recalled.
    own = moving.own.to(mean.dtype) if isinstance(moving.own, Tensor) else mean.new_full((), moving.own)
    group, size = ("", 1) if moving.replicas is None else moving.replicas
    weight = None if weight is None else weight.detach()
    zero, zero_too = torch.ops.batchrenorm.moving(
        mean, std, scale, shift, weight, count, own, moving.sigma, moving.mean, moving.slope, eps, together, group, size
    )
    return zero, zero_too, moving._replace(own=own).factor(scale, std.detach())


def _forward(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(mean), torch.zeros_like(mean)


def _backward(
    sum_dy_off: Tensor,
    sum_dy: Tensor,
    mean: Tensor,
    std: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    count: Tensor,
    own: Tensor,
    sigma: Tensor,
    gradient_mean: Tensor,
    gradient_slope: Tensor,
    eps: float,
    together: bool,
    group: str,
    replicas: int,
) -> tuple[Tensor, Tensor]:
    moving = Moving(gradient_mean, gradient_slope, own, sigma, Replicas(group, replicas) if group else None)
    sum_dy_x_hat = sum_dy_off / std
    count = count / replicas if together else count
    sum_dy, sum_dy_x_hat, _ = moving.part(sum_dy, sum_dy_x_hat, count, scale, shift, std, eps)
    a = scale / std if weight is None else scale / std * weight.to(mean.dtype)
    return -a * sum_dy, -a * sum_dy_x_hat


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.batchrenorm.moving(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.rest = inputs[10:]

    @staticmethod
    def backward(ctx: Any, factor_grad: Tensor, constant_grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_TWICE)
        gradients = torch.ops.batchrenorm.moving_backward(factor_grad, constant_grad, *ctx.saved_tensors, *ctx.rest)
        return *gradients, *[None] * 12


for _name, _function in (("moving", _forward), ("moving_backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("batchrenorm::moving", _forward, lib=_LIBRARY)
torch.library.register_fake(
    "batchrenorm::moving_backward", lambda a, b, *_: (torch.empty_like(a), torch.empty_like(b)), lib=_LIBRARY
)
_LIBRARY.impl("moving", _Node.apply, "Autograd")
