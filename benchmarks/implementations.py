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

from .cases import ADD_RELU, PLAIN, RELU

EPS, MOMENTUM, R_MAX, D_MAX = 1e-5, 0.01, 3.0, 5.0
MICROBATCH = 4


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


Function = Callable[[Tensor, Tensor | None], Tensor]
"""Of x and the residual to y."""


@dataclass(frozen=True)
class Layer:
    train: Function
    infer: Function
    parameters: tuple[Tensor, ...]
    """gamma, beta"""
    averages: Callable[[], tuple[Tensor, Tensor]] | None = None
    """mu, sigma, where the layer defines them as the paper does"""
    renorm: bool = True
    """the function it must compute: Batch Renormalization's, or batch norm's"""
    microbatch: int | None = None


def build(name: str, state: State, ndim: int, dtype: torch.dtype, fused: str = PLAIN) -> Layer:
    """A new layer.

    Args:
        name: as in `cases.EVERYONE`, `MICROBATCHED`, `COMPILED`; " again" is the same code once more.
        state: its parameters and averages.
        ndim: rank of x, with batch and channels.
        dtype: of x.
        fused: what follows it: nothing, a ReLU, or the sum with a residual and a ReLU.

    Raises:
        Unavailable: the package is missing, or it has no layer for this x.
    """
    name = name.removesuffix(" again")
    match name:
        case "bn" | "bn compiled" | "bn 8x4 looped" | "bn cudnn off" | "sync bn":
            return _batch_norm(name, state, ndim, fused)
        case "brn" | "brn compiled" | "brn 8x4":
            return _batchrenorm(name, state, ndim, fused)
        case "keras":
            return _keras(state, ndim, dtype, fused)
        case "torchrl":
            return _torchrl(state, fused)
        case "sb3":
            return _sb3(state, ndim, fused)
    raise ValueError(f"expected the name of an implementation, got {name!r}")


def _followed(layer: Callable[[Tensor], Tensor], fused: str, in_place: bool = False) -> Function:
    """The layer and what comes after it: in place for batch norm, as torchvision's nets do it."""
    if fused == PLAIN:
        return lambda x, residual: layer(x)
    if in_place:
        rectify, add = torch.relu_, Tensor.add_
    else:
        rectify, add = torch.relu, Tensor.add
    if fused == RELU:
        return lambda x, residual: rectify(layer(x))
    return lambda x, residual: rectify(add(layer(x), residual))


def _module(layer: nn.Module, fused: str, **more: Any) -> Layer:
    # Inference from a copy: switching modes to and fro is not what is measured.
    evaluated = copy.deepcopy(layer).eval()
    return Layer(_followed(layer, fused), _followed(evaluated, fused), tuple(layer.parameters()), **more)


def _batch_norm(name: str, state: State, ndim: int, fused: str) -> Layer:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[ndim]
    layer = kind(len(state.mu), EPS, MOMENTUM, device=state.mu.device)
    _load(layer.weight, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.running_mean, state.mu)
    _load(layer.running_var, state.sigma**2 - EPS)
    vectors = layer.weight, layer.bias, layer.running_mean, layer.running_var
    train: Callable[[Tensor], Tensor] = layer
    infer: Callable[[Tensor], Tensor] = copy.deepcopy(layer).eval()
    if name == "bn 8x4 looped":
        train = lambda x: torch.cat([layer(part) for part in x.split(MICROBATCH)])  # noqa: E731
    elif name in ("bn cudnn off", "sync bn"):
        if state.mu.device.type != "cuda":
            raise Unavailable("on CUDA only")
        if name == "sync bn":
            train = lambda x: _SyncBatchNorm.apply(x, *vectors)  # noqa: E731
        else:
            train = lambda x: torch.batch_norm(x, *vectors, True, MOMENTUM, EPS, False)  # noqa: E731
            infer = lambda x: torch.batch_norm(x, *vectors, False, MOMENTUM, EPS, False)  # noqa: E731
    function = _followed(train, fused, in_place=True)
    return Layer(
        torch.compile(function) if name == "bn compiled" else function,
        _followed(infer, fused, in_place=True),
        vectors[:2],
        renorm=False,
        microbatch=MICROBATCH if name == "bn 8x4 looped" else None,
    )


class _SyncBatchNorm(torch.autograd.Function):
    """nn.SyncBatchNorm's own operators, as it calls them, for one replica that sends nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        mu, invstd = torch.batch_norm_stats(x, EPS)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=mean.dtype, device=x.device)
        mu, invstd = torch.batch_norm_gather_stats_with_counts(
            x, mu[None], invstd[None], mean, var, MOMENTUM, EPS, count
        )
        ctx.save_for_backward(x, weight, mu, invstd, count.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mu, invstd, EPS)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mu, invstd, count = ctx.saved_tensors
        sums = torch.batch_norm_backward_reduce(dy, x, mu, invstd, weight, True, True, True)
        dx = torch.batch_norm_backward_elemt(dy, x, mu, invstd, weight, *sums[:2], count)
        return dx, *sums[2:], None, None


def _batchrenorm(name: str, state: State, ndim: int, fused: str) -> Layer:
    kinds = {2: "BatchRenorm1d", 3: "BatchRenorm1d", 4: "BatchRenorm2d", 5: "BatchRenorm3d"}
    microbatch = MICROBATCH if name == "brn 8x4" else None
    layer = getattr(batchrenorm, kinds[ndim])(
        len(state.mu),
        EPS,
        MOMENTUM,
        clip=batchrenorm.ClipSchedule.constant(R_MAX, D_MAX),
        microbatch_size=microbatch,
        activation=None if fused == PLAIN else "relu",
        device=state.mu.device,
    )
    _load(layer.weight, state.gamma)
    _load(layer.bias, state.beta)
    _load(layer.running_mean, state.mu)
    _load(layer.running_var, state.sigma**2 - EPS)
    evaluated = copy.deepcopy(layer).eval()
    if fused == ADD_RELU:
        train, infer = (lambda x, residual, layer=kind: layer(x, residual=residual) for kind in (layer, evaluated))
    else:
        train, infer = (lambda x, residual, layer=kind: layer(x) for kind in (layer, evaluated))
    return Layer(
        torch.compile(train) if name == "brn compiled" else train,
        infer,
        tuple(layer.parameters()),
        lambda: (layer.running_mean, layer.running_std),
        microbatch=microbatch,
    )


def _keras(state: State, ndim: int, dtype: torch.dtype, fused: str) -> Layer:
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
        dtype={torch.bfloat16: "mixed_bfloat16", torch.float16: "mixed_float16"}.get(dtype, "float32"),
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
        _followed(lambda x: layer(x, training=True), fused),
        _followed(lambda x: layer(x, training=False), fused),
        (layer.gamma.value, layer.beta.value),
        lambda: (layer.renorm_mean.value.detach(), layer.renorm_stddev.value.detach()),
    )


def _torchrl(state: State, fused: str) -> Layer:
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
    return _module(layer, fused)


def _sb3(state: State, ndim: int, fused: str) -> Layer:
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
    return _module(layer, fused)


def _load(target: Tensor | None, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)  # type: ignore[union-attr]
