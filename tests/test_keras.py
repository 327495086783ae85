"""Against Keras's `BatchNormalization(renorm=True)` on its torch backend: other people's code for the same paper.

In float32: Keras computes batch norm in float32 whatever the dtype of the layer.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import batchrenorm as brn

os.environ["KERAS_BACKEND"] = "torch"  # read once, at import
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the import of somebody else's package
    keras: Any = pytest.importorskip("keras", minversion="3.14", reason="the second oracle: pip install 'keras>=3.14'")
if keras.backend.backend() != "torch":
    pytest.skip("Keras was imported before with another backend", allow_module_level=True)

ALPHA, EPS = 0.2, 1e-3
LIMITS = {"r_max": 1.4, "d_max": 0.6}
# channels-last, as Keras has it; ours sees the same memory as (N, C, *)
SHAPES = [(8, 5), (4, 7, 3), (5, 3, 4, 6), (4, 3, 5, 1), (3, 2, 3, 2, 4)]


def keras_layer(shape: tuple[int, ...], clipped: bool) -> Any:
    clipping = {"rmax": LIMITS["r_max"], "rmin": 1 / LIMITS["r_max"], "dmax": LIMITS["d_max"]} if clipped else None
    layer = keras.layers.BatchNormalization(
        epsilon=EPS, momentum=1 - ALPHA, renorm=True, renorm_momentum=1 - ALPHA, renorm_clipping=clipping
    )
    layer.build((None, *shape[1:]))
    return layer


def ours(C: int, clipped: bool) -> brn.BatchRenorm:
    clip = brn.ClipSchedule.constant(**LIMITS) if clipped else brn.ClipSchedule.constant(float("inf"), float("inf"))
    layer = brn.BatchRenorm(C, EPS, ALPHA, clip=clip)
    # Keras starts at sigma = 1, this layer, as batch norm, at a variance of 1, so sigma = sqrt(1 + eps).
    layer.running_var.fill_(1 - EPS)
    return layer


def tensor(variable: Any) -> Tensor:
    return variable.value.detach()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Both compute in float32, and each may be off by 1e-5 of its terms, as against the oracle in test_exact.py.

    Terms of a result are no larger here than its largest element and 1: x, dy and the parameters are of that size.
    """
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_and_inference(shape: tuple[int, ...], clipped: bool) -> None:
    C = shape[-1]
    theirs, layer = keras_layer(shape, clipped), ours(C, clipped)
    weight, bias = torch.randn(2, C)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    theirs.gamma.assign(weight)
    theirs.beta.assign(bias)
    outside = 0
    for step in range(6):
        x = torch.randn(shape) * (0.5 + step / 2) + torch.linspace(-1, 1, C) * step
        dy = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        outside += int(((x.flatten(0, -2).std(0) / layer.running_std).log().abs() > np.log(LIMITS["r_max"])).sum())
        theirs_y = theirs(a, training=True)
        y = layer(b.movedim(-1, 1)).movedim(1, -1)
        assert_close(y, theirs_y)
        expected = torch.autograd.grad(theirs_y, [a, theirs.gamma.value, theirs.beta.value], dy)
        got = torch.autograd.grad(y, [b, layer.weight, layer.bias], dy)
        for p, q in zip(got, expected):
            assert_close(p, q)
        assert_close(layer.running_mean, tensor(theirs.renorm_mean))
        assert_close(layer.running_std, tensor(theirs.renorm_stddev))
        # and what Keras infers with: the same averages, as a variance without eps
        assert_close(layer.running_mean, tensor(theirs.moving_mean))
        assert_close(layer.running_var, tensor(theirs.moving_variance))
    assert outside > 0  # there was something to clip
    layer.eval()
    assert_close(layer(x.movedim(-1, 1)).movedim(1, -1), theirs(x, training=False))


@pytest.mark.parametrize("shape", [(8, 5), (4, 7, 3), (5, 3, 4, 6)], ids=str)
def test_mask(shape: tuple[int, ...]) -> None:
    theirs, layer = keras_layer(shape, True), ours(shape[-1], True)
    for _ in range(4):
        x = torch.randn(shape) * 2 + 1
        dy = torch.randn_like(x)
        mask = torch.rand(shape[:-1]) < 0.6
        mask.view(-1)[:2] = True
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        theirs_y = theirs(a, training=True, mask=mask)
        y = layer(b.movedim(-1, 1), mask).movedim(1, -1)
        assert_close(y, theirs_y)
        for p, q in zip(torch.autograd.grad(y, b, dy), torch.autograd.grad(theirs_y, a, dy)):
            assert_close(p, q)
        assert_close(layer.running_mean, tensor(theirs.renorm_mean))
        assert_close(layer.running_std, tensor(theirs.renorm_stddev))
