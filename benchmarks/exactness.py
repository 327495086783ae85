"""Whether they compute the right thing, and how exactly: no speed is of interest before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchrenorm import reference
from batchrenorm.bench import DTYPES

from .cases import ADD_RELU, FUSED, PLAIN, Case
from .implementations import D_MAX, EPS, MOMENTUM, R_MAX, State, Unavailable, build


class Refused(Exception):
    """Ours is wrong."""


class Inputs(NamedTuple):
    x: Tensor
    """requires grad, as does the residual"""
    dy: Tensor
    residual: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x] if self.residual is None else [self.x, self.residual]


def inputs(case: Case, device: str, seed: int = 1) -> Inputs:
    """Random ones: x with mean 0.5 and standard deviation 1.5."""
    g = torch.Generator(device).manual_seed(seed)
    count = 3 if case.fused == ADD_RELU else 2
    x, dy, *residual = (torch.randn(case.shape, generator=g, device=device) for _ in range(count))
    x, dy, *residual = (case.arrange(t.to(DTYPES[case.dtype])) for t in (x.mul_(1.5).add_(0.5), dy, *residual))
    return Inputs(x.requires_grad_(), dy, residual[0].requires_grad_() if residual else None)


def error(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; inf for anything not finite."""
    difference = (value.detach().to(expected.dtype) - expected).abs().max() / expected.abs().max()
    return difference.item() if difference.isfinite() else math.inf


NEAR_ZERO = {"fp32": 1e-3, "bf16": 0.1, "fp16": 2e-2}
"""Where y before the ReLU is this near to 0, rounding in x's dtype decides which way it goes, for everyone."""


_ELEMENTS = 2e6


class Truth(NamedTuple):
    y: Tensor
    gradients: tuple[Tensor, ...]
    """dx, dgamma, dbeta"""
    averages: tuple[Tensor, ...]
    """mu, sigma"""
    dy: Tensor
    """the one to use: 0 where y is near 0 before a ReLU"""


def some_channels(case: Case, device: str) -> Tensor:
    """All channels; of large x on the CPU so many, evenly from the first to the last, as float64 takes a second for."""
    C = case.shape[1]
    count = C if device != "cpu" else min(C, max(2, int(_ELEMENTS * C / math.prod(case.shape))))
    return torch.linspace(0, C - 1, count).round().long().unique().to(device)


def truth(
    case: Case, given: Inputs, state: State, renorm: bool, microbatch: int | None = None, channels: Tensor | None = None
) -> Truth:
    """All of it in float64 by `batchrenorm.reference`, for these channels; batch norm is r_max=1, d_max=0."""
    channels = torch.arange(case.shape[1], device=given.x.device) if channels is None else channels
    x = given.x.detach()[:, channels].double().requires_grad_()
    gamma, beta, mu, sigma = (v[channels].double() for v in (state.gamma, state.beta, state.mu, state.sigma))
    gamma.requires_grad_(), beta.requires_grad_()
    limits = {"r_max": R_MAX, "d_max": D_MAX} if renorm else {"r_max": 1.0, "d_max": 0.0}
    parts = [
        reference.batch_renorm(part, mu, sigma, gamma, beta, alpha=MOMENTUM, eps=EPS, **limits)
        for part in x.split(microbatch or x.shape[0])
    ]
    y, dy = torch.cat([part[0] for part in parts]), given.dy
    if given.residual is not None:
        y = y + given.residual.detach()[:, channels].double()
    if case.fused != PLAIN:
        dy = dy.clone(memory_format=torch.preserve_format)
        dy[:, channels] = dy[:, channels].masked_fill(y.detach().abs() < NEAR_ZERO[case.dtype], 0)
        y = y.relu()
    gradients = torch.autograd.grad(y, [x, gamma, beta], dy[:, channels].double())
    return Truth(y.detach(), gradients, tuple(torch.stack([p[i] for p in parts]).mean(0) for i in (1, 2)), dy)


def inference_truth(case: Case, given: Inputs, state: State, channels: Tensor | None = None) -> Tensor:
    channels = torch.arange(case.shape[1], device=given.x.device) if channels is None else channels
    vectors = (v[channels].double() for v in (state.gamma, state.beta, state.mu, state.sigma))
    gamma, beta, mu, sigma = (v.view((1, -1) + (1,) * (len(case.shape) - 2)) for v in vectors)
    y = gamma * (given.x.detach()[:, channels].double() - mu) / sigma + beta
    if given.residual is not None:
        y = y + given.residual.detach()[:, channels].double()
    return y if case.fused == PLAIN else y.relu()


GATE = tuple(
    Case("gate", shape, dtype, last, fused)
    for shape, dtype, last in (
        ((16, 24, 5, 3), "fp32", False),
        ((16, 24, 5, 3), "fp32", True),
        ((16, 24, 5, 3), "bf16", False),
        ((16, 24, 5, 3), "fp16", True),
        ((16, 24), "fp32", False),
        ((4, 24, 3, 3, 3), "fp32", False),
    )
    for fused in FUSED
)
GATE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
QUANTITIES = ("y", "dx", "dgamma", "dbeta", "mean", "sigma")


def gate(names: list[str], device: str = "cpu", say: Callable[[str], None] = print) -> dict[str, float]:
    """Every renorm against `batchrenorm.reference` in float64, on small tensors with r and d active and partly clipped.

    Args:
        names: implementations, as in `build`.
        device: where.
        say: takes a line for each disagreement of a peer.

    Returns:
        The largest error of each in float32, relative to the largest value.

    Raises:
        Refused: ours disagrees.
    """
    worst: dict[str, float] = {}
    for case in GATE:
        given = inputs(case, device)
        state = State.random(case.shape[1], device, seed=2)
        for name in names:
            try:
                layer, fresh = (build(name, state, given.x.ndim, given.x.dtype, case.fused) for _ in range(2))
            except Unavailable:
                continue
            expected = truth(case, given, state, layer.renorm, layer.microbatch)
            y = layer.train(given.x, given.residual)
            gradients = torch.autograd.grad(y, [given.x, *layer.parameters], expected.dy.to(y.dtype))
            got = (y, *gradients, *(layer.averages() if layer.averages else ()))
            wanted = (expected.y, *expected.gradients, *expected.averages)
            wrong = {quantity: error(g, e) for quantity, g, e in zip(QUANTITIES, got, wanted)}
            if layer.averages is not None and layer.microbatch is None:
                with torch.no_grad():
                    y = fresh.infer(given.x, given.residual)
                    wrong["inference"] = error(y, inference_truth(case, given, state))
            quantity, largest = max(wrong.items(), key=lambda item: item[1])
            if case.dtype == "fp32":
                worst[name] = max(worst.get(name, 0.0), largest)
            if largest > GATE_TOLERANCE[case.dtype]:
                text = f"{name} disagrees with batchrenorm.reference on {case.name!r}: {quantity} by {largest:.1e}"
                if name.startswith("brn"):
                    raise Refused(
                        f"{text}, expected at most {GATE_TOLERANCE[case.dtype]:.0e}; "
                        "correct it first (make test), then measure"
                    )
                say(f"  {text}")
    return worst
