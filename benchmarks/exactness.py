"""Whether they compute the right thing, and how exactly: no speed is of interest before."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from batchrenorm import reference

from .cases import DTYPES, Case
from .implementations import D_MAX, EPS, MOMENTUM, R_MAX, State, Unavailable, build


class Refused(Exception):
    """Ours is wrong."""


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """x, which requires grad, and dy."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(case.shape, generator=g) for _ in range(2))
    x, dy = (case.arrange(t.to(device, DTYPES[case.dtype])) for t in (x.mul_(1.5).add_(0.5), dy))
    return x.requires_grad_(), dy


def error(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; inf for anything not finite."""
    difference = (value.detach().to(expected.dtype) - expected).abs().max() / expected.abs().max()
    return difference.item() if difference.isfinite() else math.inf


def truth(
    x: Tensor, dy: Tensor, state: State, renorm: bool, microbatch: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dgamma, dbeta, new mu, new sigma in float64 by `batchrenorm.reference`; batch norm is r_max=1, d_max=0."""
    x = x.detach().double().requires_grad_()
    mu, sigma = state.mu.double(), state.sigma.double()
    gamma, beta = (v.double().requires_grad_() for v in (state.gamma, state.beta))
    limits = {"r_max": R_MAX, "d_max": D_MAX} if renorm else {"r_max": 1.0, "d_max": 0.0}
    parts = [
        reference.batch_renorm(part, mu, sigma, gamma, beta, alpha=MOMENTUM, eps=EPS, **limits)
        for part in x.split(microbatch or x.shape[0])
    ]
    y = torch.cat([part[0] for part in parts])
    gradients = torch.autograd.grad(y, [x, gamma, beta], dy.double())
    averages = (torch.stack([part[i] for part in parts]).mean(0) for i in (1, 2))
    return y.detach(), *gradients, *averages


def inference_truth(x: Tensor, state: State) -> Tensor:
    like = (1, -1) + (1,) * (x.ndim - 2)
    gamma, beta, mu, sigma = (v.double().view(like) for v in (state.gamma, state.beta, state.mu, state.sigma))
    return gamma * (x.detach().double() - mu) / sigma + beta


GATE = (
    Case("gate", (16, 24, 5, 3)),
    Case("gate channels_last", (16, 24, 5, 3), channels_last=True),
    Case("gate bf16", (16, 24, 5, 3), "bf16"),
    Case("gate dense", (16, 24)),
    Case("gate 3-d", (4, 24, 3, 3, 3)),
)
GATE_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
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
        x, dy = inputs(case, device)
        state = State.random(case.shape[1], device, seed=2)
        for name in names:
            try:
                layer = build(name, state, x.ndim, x.dtype)
            except Unavailable:
                continue
            y = layer.train(x)
            gradients = torch.autograd.grad(y, [x, *layer.parameters], dy.to(y.dtype))
            got = (y, *gradients, *(layer.averages() if layer.averages else ()))
            wrong = {
                quantity: error(g, e)
                for quantity, g, e in zip(QUANTITIES, got, truth(x, dy, state, layer.renorm, layer.microbatch))
            }
            if layer.averages is not None and layer.microbatch is None:
                with torch.no_grad():
                    fresh = build(name, state, x.ndim, x.dtype)
                    wrong["inference"] = error(fresh.infer(x), inference_truth(x, state))
            quantity, largest = max(wrong.items(), key=lambda item: item[1])
            if case.dtype == "fp32":
                worst[name] = max(worst.get(name, 0.0), largest)
            if largest > GATE_TOLERANCE[case.dtype]:
                text = f"{name} disagrees with batchrenorm.reference on {case.name!r}: {quantity} by {largest:.1e}"
                if name.startswith("brn"):
                    expected = GATE_TOLERANCE[case.dtype]
                    raise Refused(
                        f"{text}, expected at most {expected:.0e}; correct it first (make test), then measure"
                    )
                say(f"  {text}")
    return worst
