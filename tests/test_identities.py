"""What is exactly true of Batch Renormalization, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batchrenorm as brn

OPEN = {"r_max": float("inf"), "d_max": float("inf")}
CLOSED = {"r_max": 1.0, "d_max": 0.0}
SHAPES = [(12, 5), (4, 5, 7), (6, 5, 4, 3), (4, 1, 5, 5), (2, 16, 8, 8), (3, 4, 2, 3, 5)]
# also one that is large without any patching
SHAPES_AND_LARGE = [*SHAPES, (5, 32, 17, 15)]


def inputs(shape: tuple[int, ...], layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, a cotangent, weight, bias, and averages near the statistics of x but not at them; float64."""
    C = shape[1]
    channel = (1, C) + (1,) * (len(shape) - 2)
    offset, size = torch.randn(2, C, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * size.exp().view(channel) + offset.view(channel)
    dy, weight, bias = torch.randn_like(x), torch.randn(C).double(), torch.randn(C).double()
    if layout == "channels_last" and len(shape) == 4:
        x, dy = x.contiguous(memory_format=torch.channels_last), dy.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.nn.functional.pad(x, (1, 1))[..., 1:-1]
    mean, var = offset + 0.3 * torch.randn(C).double(), (size.exp() * (1 + torch.rand(C).double())) ** 2
    return x, dy, weight, bias, mean, var


def channels(x: Tensor) -> Tensor:
    """(C, all the rest)"""
    return x.movedim(1, 0).flatten(1)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (like.ndim - 2))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES_AND_LARGE, ids=str)
def test_closed_limits_are_batch_norm_to_the_last_bit(
    cpu: str, shape: tuple[int, ...], layout: str, weighted: bool, biased: bool
) -> None:
    """r_max = 1, d_max = 0, in float64 on the CPU: y and all gradients."""
    x, dy, weight, bias, mean, var = inputs(shape, layout)

    def results(renorm: bool) -> list[Tensor]:
        leaves = [x.detach().requires_grad_()]
        w = weight.clone().requires_grad_() if weighted else None
        b = bias.clone().requires_grad_() if biased else None
        leaves += [t for t in (w, b) if t is not None]
        if renorm:
            y = brn.batch_renorm(leaves[0], mean.clone(), var.clone(), w, b, training=True, **CLOSED)
        else:
            y = F.batch_norm(leaves[0], mean.clone(), var.clone(), w, b, training=True)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for ours, theirs in zip(results(True), results(False), strict=True):
        assert torch.equal(ours, theirs)


def test_warm_up_is_batch_norm_to_the_last_bit(cpu: str) -> None:
    """The layer, from its first forward through the last of the warm-up; the one after is another function."""
    layer = brn.BatchRenorm2d(4, clip=brn.ClipSchedule(warmup=3, d_full=6, r_full=6), dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    for step in range(6):
        x = torch.randn(5, 4, 3, 3, dtype=torch.float64) * 2 + 1
        dy = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        norm.zero_grad()
        y, z = layer(a), norm(b)
        y.backward(dy)
        z.backward(dy)
        equal = [
            torch.equal(p, q)
            for p, q in (
                (y, z),
                (a.grad, b.grad),
                (layer.weight.grad, norm.weight.grad),
                (layer.bias.grad, norm.bias.grad),
            )
        ]
        # limits are a function of the finished steps: closed at 0, 1, 2 and 3
        assert equal == ([True] * 4 if step <= 3 else [False, False, False, True])


@pytest.mark.parametrize("microbatch_size", [None, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unclipped_training_is_inference(shape: tuple[int, ...], microbatch_size: int | None, backend: str) -> None:
    """y = weight * (x - mu) / sigma + bias with the averages of before the step, eps once: however x is divided up.

    Both sides round: relative to their terms, |weight| (|x| + |mu|) / sigma + |bias|, by a few u = 1.1e-16, and r once
    and sigma_B twice more; 1e-13 is 900 u.
    """
    if shape == (3, 4, 2, 3, 5) and microbatch_size == 2:
        microbatch_size = 1
    x, _, weight, bias, mean, var = inputs(shape)
    eps = 0.1  # large: an eps too many or too few shows
    expected = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    y = brn.batch_renorm(
        x, mean.clone(), var.clone(), weight, bias, training=True, eps=eps, microbatch_size=microbatch_size,
        backend=backend, **OPEN,
    )  # fmt: skip
    a, b = (per_channel(v, x) for v in (weight / (var + eps).sqrt(), bias))
    terms = a.abs() * (x.abs() + per_channel(mean, x).abs()) + b.abs()
    sigma_B_ratio = 10  # x / sigma_B * r is x / sigma, but rounded at the size of its factors
    assert ((y - expected).abs() <= 1e-13 * sigma_B_ratio * terms.amax()).all()


def test_unclipped_layer_in_training_is_the_layer_in_inference(cpu: str) -> None:
    layer = brn.BatchRenorm2d(4, clip=brn.ClipSchedule.constant(1e6, 1e6), momentum=0.3, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(6, 4, 3, 3, dtype=torch.float64) * 3 - 1
        expected = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unclipped_training_is_inference_in_half(cpu: str, dtype: torch.dtype) -> None:
    """Statistics in half would be off by 2**-9 of the mean; two roundings of the same number differ by one ulp."""
    layer = brn.BatchRenorm2d(4, clip=brn.ClipSchedule.constant(1e6, 1e6))
    x = (torch.randn(8, 4, 6, 6) + 20).to(dtype)
    expected = layer.eval()(x)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.train()(x), expected, rtol=1.01 * ulp, atol=0)


def test_output_of_an_example_is_its_own(backend: str) -> None:
    """What the paper is for: unclipped, y of an example does not notice the company it is in. Clipped, it does."""
    x, _, weight, bias, mean, var = inputs((8, 5, 3, 3))
    other = torch.cat([x[:1], torch.randn_like(x[1:]) * 5 - 2])

    def first(x: Tensor, limits: dict[str, float]) -> Tensor:
        options = {"training": True, "backend": backend, **limits}
        return brn.batch_renorm(x, mean.clone(), var.clone(), weight, bias, **options)[0]

    torch.testing.assert_close(first(x, OPEN), first(other, OPEN), rtol=1e-12, atol=1e-12)
    assert (first(x, CLOSED) - first(other, CLOSED)).abs().max() > 0.1


@pytest.mark.parametrize("limits", [OPEN, CLOSED, {"r_max": 1.2, "d_max": 0.1}], ids=["open", "closed", "clipped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_sum_to_zero(shape: tuple[int, ...], limits: dict[str, float], backend: str) -> None:
    """Shifting a minibatch changes nothing, r and d being constants. Rounding: up to m u max|dx|."""
    x, dy, weight, bias, mean, var = inputs(shape)
    x.requires_grad_()
    y = brn.batch_renorm(x, mean, var, weight, bias, training=True, backend=backend, **limits)
    (dx,) = torch.autograd.grad(y, x, dy)
    sums, largest = channels(dx).sum(1).abs(), channels(dx).abs().amax(1)
    m = channels(dx).shape[1]
    assert (sums <= 8 * m * torch.finfo(torch.float64).eps * largest).all()
    # the cotangents do not: it is the projection that does it
    assert (channels(dy).sum(1).abs() > 1e-3).all()


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("limits", [OPEN, CLOSED, {"r_max": 1.2, "d_max": 0.1}], ids=["open", "closed", "clipped"])
def test_gradient_is_the_scaled_cotangent_projected_off_1_and_x(
    limits: dict[str, float], eps: float, microbatch_size: int | None, backend: str
) -> None:
    """Section 3: "scale by r / sigma_B, then project onto the null space of p0 = (1, ...) and p1 = (x_1, ...)".

    Exact for eps = 0. Otherwise the term along x - mu_B is (x - mu_B) <g, x - mu_B> / (var + eps) where the projection
    has / var, so they differ by the fraction eps / (var + eps) of it.
    """
    x, dy, weight, bias, mean, var = inputs((9, 5, 3, 4))
    x.requires_grad_()
    y = brn.batch_renorm(
        x, mean.clone(), var.clone(), weight, bias, training=True, eps=eps, microbatch_size=microbatch_size,
        backend=backend, **limits,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y, x, dy)
    size = microbatch_size or 9
    sigma = (var + eps).sqrt()
    for x_g, dy_g, dx_g in zip(x.detach().split(size), dy.split(size), dx.split(size)):
        for c, (xs, dys, dxs) in enumerate(zip(channels(x_g), channels(dy_g), channels(dx_g))):
            var_B = xs.var(correction=0)
            r = ((var_B + eps).sqrt() / sigma[c]).clamp(1 / limits["r_max"], limits["r_max"])
            scaled = dys * weight[c] * r / (var_B + eps).sqrt()
            q, _ = torch.linalg.qr(torch.stack([torch.ones_like(xs), xs - xs.mean()], 1))
            along_x = q[:, 1] * (q[:, 1] @ scaled)
            projected = scaled - q[:, 0] * (q[:, 0] @ scaled) - along_x
            bound = along_x.abs() * eps / (var_B + eps) + 1e-13 * scaled.abs().max()
            assert ((dxs - projected).abs() <= 1.001 * bound).all()


def test_no_gradient_through_r_and_d(backend: str) -> None:
    """Unclipped, y is (x - mu) / sigma, whose own derivative, dy / sigma, is not what the paper wants."""
    x, dy, _, _, mean, var = inputs((6, 5))
    x.requires_grad_()
    sigma = (var + 1e-5).sqrt()
    y = brn.batch_renorm(x, mean, var, training=True, backend=backend, **OPEN)
    (dx,) = torch.autograd.grad(y, x, dy)
    through = dy / per_channel(sigma, x)
    assert (dx - through).abs().max() > 0.1 * through.abs().max()
    assert (channels(dx * x.detach()).sum(1).abs() < 1e-3 * channels((through * x).abs()).sum(1)).all()


def test_sigma_averages_the_standard_deviation(backend: str) -> None:
    """Then E[r] = 1 and E[d] = 0, exactly, over the minibatches that were averaged; with a variance average E[r] < 1.

    eps = 0 and weight 1: r and d are the standard deviation and the mean of the output.
    """
    batches = [torch.randn(16, 3, 4, 4, dtype=torch.float64) * (1 + 2 * k) + k for k in range(4)]
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    options = {"training": True, "eps": 0.0, "backend": backend, **OPEN}
    for k, x in enumerate(batches):
        brn.batch_renorm(x, mean, var, momentum=1 / (k + 1), **options)
    outputs = [brn.batch_renorm(x, mean, var, momentum=0.0, **options) for x in batches]
    r = torch.stack([y.std((0, 2, 3), correction=0) for y in outputs])
    d = torch.stack([y.mean((0, 2, 3)) for y in outputs])
    torch.testing.assert_close(r.mean(0), torch.ones_like(r[0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(d.mean(0), torch.zeros_like(d[0]), rtol=0, atol=1e-12)
    assert r.std(0).min() > 0.3  # not trivially so: the root of the mean square would have been off by
    assert (r.square().mean(0).sqrt() - 1).min() > 0.05


def test_microbatches_keep_the_average_of_the_standard_deviation(backend: str) -> None:
    """One step over G microbatches moves sigma to the mean of their sigma_B with momentum 1."""
    x, _, _, _, mean, var = inputs((8, 5, 3, 3))
    brn.batch_renorm(x, mean, var, training=True, momentum=1.0, microbatch_size=2, eps=0.0, backend=backend)
    groups = x.split(2)
    expected = torch.stack([g.std((0, 2, 3), correction=0) for g in groups]).mean(0)
    torch.testing.assert_close(var.sqrt(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-14)
    assert (x.std((0, 2, 3), correction=0) - expected).min() > 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [6, 7, 1000])
def test_microbatch_of_the_whole_batch_is_none(size: int, layout: str, backend: str) -> None:
    x, dy, weight, bias, mean, var = inputs((6, 5, 4, 3), layout)
    results = []
    for microbatch_size in (None, size):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        m, v = mean.clone(), var.clone()
        y = brn.batch_renorm(
            leaves[0], m, v, *leaves[1:], training=True, microbatch_size=microbatch_size, backend=backend
        )
        results.append([y, *torch.autograd.grad(y, leaves, dy), m, v])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_microbatches_are_separate_calls(layout: str, backend: str) -> None:
    """y and dx of a microbatch are those of a call with this microbatch alone; parameters' gradients add up."""
    x, dy, weight, bias, mean, var = inputs((7, 5, 4, 3), layout)
    options = {"training": True, "r_max": 1.3, "d_max": 0.5, "backend": backend}

    def results(parts: tuple[Tensor, ...], dys: tuple[Tensor, ...], size: int | None) -> list[Tensor]:
        leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        parts = tuple(p.detach().requires_grad_() for p in parts)
        ys = [brn.batch_renorm(p, mean.clone(), var.clone(), *leaves, microbatch_size=size, **options) for p in parts]
        gradients = torch.autograd.grad(ys, [*parts, *leaves], dys)
        return [torch.cat(ys), torch.cat(gradients[:-2]), *gradients[-2:]]

    for a, b in zip(results((x,), (dy,), 3), results(x.split(3), dy.split(3), None)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_order_of_the_batch_does_not_matter(backend: str) -> None:
    x, dy, weight, bias, mean, var = inputs((9, 5, 4, 3))
    order = torch.randperm(9)
    results = []
    for index in (torch.arange(9), order):
        leaves = [t.detach().clone().requires_grad_() for t in (x[index], weight, bias)]
        m, v = mean.clone(), var.clone()
        y = brn.batch_renorm(leaves[0], m, v, *leaves[1:], training=True, r_max=1.3, d_max=0.2, backend=backend)
        dx, *gradients = torch.autograd.grad(y, leaves, dy[index])
        back = index.argsort()
        results.append([y[back], dx[back], *gradients, m, v])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limits", [OPEN, CLOSED, {"r_max": 1.2, "d_max": 0.1}], ids=["open", "closed", "clipped"])
def test_units_do_not_matter(limits: dict[str, float], backend: str) -> None:
    """x in other units, a x + b with averages in those units: the same y, gradients by the factor; eps = 0."""
    x, dy, weight, bias, mean, var = inputs((9, 5, 4, 3))
    a, b = 2.5, -3.0
    results = []
    for factor, offset in ((1.0, 0.0), (a, b)):
        leaf = (x * factor + offset).requires_grad_()
        m, v = mean * factor + offset, var * factor**2
        y = brn.batch_renorm(leaf, m, v, weight, bias, training=True, eps=0.0, backend=backend, **limits)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        results.append([y, dx * factor, (m - offset) / factor, v / factor**2])
    for p, q in zip(*results):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def test_two_values_leave_no_gradient(backend: str) -> None:
    """Off (1, x) nothing remains of two values but O(eps): documented, and true of batch norm as well."""
    x = torch.tensor([[0.0, 1.0], [2.0, -4.0]], dtype=torch.float64, requires_grad=True)
    y = brn.batch_renorm(x, torch.zeros(2).double(), torch.ones(2).double(), training=True, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(x))
    # the fraction eps / (var + eps) of |dy| r / sigma_B, with var 1 and 6.25
    assert dx.abs().max() < 1e-4
    assert np.isfinite(dx.numpy()).all()
