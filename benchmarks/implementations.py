"""The layers that race, all made from one state and called in one way."""

from __future__ import annotations

import copy
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchrenorm

EPS, MOMENTUM, R_MAX, D_MAX = 1e-5, 0.01, 3.0, 5.0
MICROBATCH = 4
"""Limits open from the first step, so that every renorm does its full work."""


class Unavailable(Exception):
    """This implementation cannot run here or on this case; the text says why."""


@dataclass(frozen=True)
class State:
    """The (C,)-vectors that every layer begins with."""

    gamma: Tensor
    beta: Tensor
    mu: Tensor
    sigma: Tensor

    @classmethod
    def random(cls, C: int, device: str, seed: int = 0) -> State:
        # Around the inputs of `measure.inputs` (mean 0.5, std 1.5), wide enough that a few channels in each hundred are
        # clipped in r and in d.
        g = torch.Generator().manual_seed(seed)
        normal = lambda: torch.randn(C, generator=g)  # noqa: E731
        vectors = (1 + 0.2 * normal(), 0.2 * normal(), 0.5 + normal(), 1.5 * (0.5 * normal()).exp())
        return cls(*(v.to(device) for v in vectors))


@dataclass(frozen=True)
class Layer:
    train: Callable[[Tensor], Tensor]
    infer: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    """gamma, beta"""
    averages: Callable[[], tuple[Tensor, Tensor]] | None = None
    """mu, sigma, where the layer defines them as the paper does"""
    renorm: bool = True
    """the function it must compute: Batch Renormalization's, or batch norm's"""
    microbatch: int | None = None


def build(name: str, state: State, ndim: int, dtype: torch.dtype) -> Layer:
    """A new layer.

    Args:
        name: as in `cases.EVERYONE`, `MICROBATCHED`, `COMPILED`; " again" is the same code once more.
        state: its parameters and averages.
        ndim: rank of x, with batch and channels.
        dtype: of x.

    Raises:
        Unavailable: the package is missing, or it has no layer for this x.
    """
    name = name.removesuffix(" again")
    match name:
        case "bn" | "bn compiled" | "bn 8x4 looped":
            return _batch_norm(state, ndim, compiled=name == "bn compiled", looped="looped" in name)
        case "brn" | "brn compiled" | "brn 8x4":
            microbatch = MICROBATCH if name == "brn 8x4" else None
            return _batchrenorm(state, ndim, compiled=name == "brn compiled", microbatch=microbatch)
        case "keras":
            return _keras(state, ndim, dtype)
        case "torchrl":
            return _torchrl(state)
        case "sb3":
            return _sb3(state, ndim)
    raise ValueError(f"expected the name of an implementation, got {name!r}")


def _module(layer: nn.Module, compiled: bool = False, **more: Any) -> Layer:
    train = torch.compile(layer) if compiled else layer
    # Inference from a copy: switching modes to and fro is not what is measured.
    return Layer(train, copy.deepcopy(layer).eval(), tuple(layer.parameters()), **more)


def _batch_norm(state: State, ndim: int, compiled: bool, looped: bool) -> Layer:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[ndim]
    layer = kind(len(state.mu), EPS, MOMENTUM, device=state.mu.device)
    _load(layer.weight, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.running_mean, state.mu)
    _load(layer.running_var, state.sigma**2 - EPS)
    if not looped:
        return _module(layer, compiled, renorm=False)
    loop = lambda x: torch.cat([layer(part) for part in x.split(MICROBATCH)])  # noqa: E731
    return Layer(loop, copy.deepcopy(layer).eval(), tuple(layer.parameters()), renorm=False, microbatch=MICROBATCH)


def _batchrenorm(state: State, ndim: int, compiled: bool, microbatch: int | None) -> Layer:
    kinds = {2: "BatchRenorm1d", 3: "BatchRenorm1d", 4: "BatchRenorm2d", 5: "BatchRenorm3d"}
    clip = batchrenorm.ClipSchedule.constant(R_MAX, D_MAX)
    layer = getattr(batchrenorm, kinds[ndim])(
        len(state.mu), EPS, MOMENTUM, clip=clip, microbatch_size=microbatch, device=state.mu.device
    )
    _load(layer.weight, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.running_mean, state.mu)
    _load(layer.running_var, state.sigma**2 - EPS)
    averages = lambda: (layer.running_mean, layer.running_std)  # noqa: E731
    return _module(layer, compiled, averages=averages, microbatch=microbatch)


def _keras(state: State, ndim: int, dtype: torch.dtype) -> Layer:
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    version = importlib.metadata.version("keras")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 14):
        raise Unavailable(f"Keras {version} is installed, renorm came back with 3.14")
    if keras.backend.backend() != "torch":
        raise Unavailable(f"Keras was imported before with the backend {keras.backend.backend()!r}")
    layer = keras.layers.BatchNormalization(
        axis=1,
        momentum=1 - MOMENTUM,
        epsilon=EPS,
        renorm=True,
        renorm_clipping={"rmax": R_MAX, "rmin": 1 / R_MAX, "dmax": D_MAX},
        renorm_momentum=1 - MOMENTUM,
        dtype="mixed_bfloat16" if dtype == torch.bfloat16 else "float32",
    )
    layer.build((None, len(state.mu), *[None] * (ndim - 2)))
    layer.gamma.assign(state.gamma)
    layer.beta.assign(state.beta)
    for variable in (layer.moving_mean, layer.renorm_mean):
        variable.assign(state.mu)
    for variable in (layer.moving_stddev, layer.renorm_stddev):
        variable.assign(state.sigma)
    layer.moving_variance.assign(state.sigma**2 - EPS)
    return Layer(
        lambda x: layer(x, training=True),
        lambda x: layer(x, training=False),
        (layer.gamma.value, layer.beta.value),
        lambda: (layer.renorm_mean.value.detach(), layer.renorm_stddev.value.detach()),
    )


def _torchrl(state: State) -> Layer:
    try:
        from torchrl.modules.models.batchrenorm import BatchRenorm1d
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    # warmup_steps=0 is its correction at full strength; with more, the factor grows without bound after the warm-up.
    layer = BatchRenorm1d(len(state.mu), momentum=MOMENTUM, eps=EPS, max_r=R_MAX, max_d=D_MAX, warmup_steps=0).to(
        state.mu.device
    )
    _load(layer.weight, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.running_mean, state.mu)
    _load(layer.running_var, state.sigma**2 - EPS)
    return _module(layer)


def _sb3(state: State, ndim: int) -> Layer:
    if ndim != 2:
        raise Unavailable("its statistics are over dimension 0 only, so it takes (N, C)")
    try:
        from sb3_contrib.common.torch_layers import BatchRenorm1d
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    # It corrects only while steps > warmup_steps.
    layer = BatchRenorm1d(len(state.mu), eps=EPS, momentum=MOMENTUM, warmup_steps=-1).to(state.mu.device)
    _load(layer.scale, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.ra_mean, state.mu)
    _load(layer.ra_var, state.sigma**2 - EPS)
    return _module(layer)


def _load(target: Tensor | None, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)  # type: ignore[union-attr]
