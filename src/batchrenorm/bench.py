"""`batchrenorm bench`: what Batch Renormalization costs on one's own shapes or model, and one's own machine."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .convert import convert_batchnorm
from .modules import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .schedule import ClipSchedule
from .timing import Call, Times, summarise, time_rounds, wall

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
OPEN = ClipSchedule.constant(3.0, 5.0)
"""Limits open from the first step, so that the correction does its full work."""

_LAYERS: dict[int, tuple[type[nn.Module], type[BatchRenorm]]] = {
    2: (nn.BatchNorm1d, BatchRenorm1d),
    3: (nn.BatchNorm1d, BatchRenorm1d),
    4: (nn.BatchNorm2d, BatchRenorm2d),
    5: (nn.BatchNorm3d, BatchRenorm3d),
}


class Line(NamedTuple):
    """Times of batch norm, of the same again (the noise), and of Batch Renormalization."""

    what: str
    run: str
    norm: Times
    again: Times
    renorm: Times


def arrange(x: Tensor, channels_last: bool) -> Tensor:
    """x in the layout."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim] if channels_last else torch.contiguous_format)


def layers(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    channels_last: bool = False,
    relu: bool = False,
    seconds: float = 2.0,
) -> Iterator[Line]:
    """One layer on random x: a training step's forward and backward, the forward alone, and inference.

    Args:
        shape: of x, ``(N, C, *spatial)``.
        dtype: of x; parameters are float32.
        device: where.
        channels_last: the layout of x.
        relu: followed by a ReLU, which Batch Renormalization does in its own passes.
        seconds: for each of the three.

    Raises:
        ValueError: there is no layer for this shape, or it has a single value per channel.
    """
    if len(shape) not in _LAYERS or min(shape) < 1:
        raise ValueError(f"expected a shape N,C or N,C,L or N,C,H,W or N,C,D,H,W of positive numbers, got {shape}")
    if channels_last and len(shape) not in CHANNELS_LAST:
        raise ValueError(f"expected a 4-d or 5-d shape for channels_last, got {shape}; leave --layout out")
    if shape[0] * torch.Size(shape[2:]).numel() < 2:
        raise ValueError(f"expected more than one value per channel in training, got shape {shape}; enlarge N")
    x, dy = (arrange(torch.randn(shape, device=device).to(dtype), channels_last) for _ in range(2))
    x.requires_grad_()
    norm_of, renorm_of = _LAYERS[len(shape)]
    norm, again = (norm_of(shape[1], device=device) for _ in range(2))
    renorm = renorm_of(shape[1], clip=OPEN, activation="relu" if relu else None, device=device)
    after: Callable[[Tensor], Tensor] = torch.relu_ if relu else lambda y: y
    contestants = {"norm": (norm, after), "again": (again, after), "renorm": (renorm, lambda y: y)}

    def training(layer: nn.Module, after: Callable[[Tensor], Tensor]) -> Call:
        leaves = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(after(layer(x)), leaves, dy)

    def inference(layer: nn.Module, after: Callable[[Tensor], Tensor]) -> Call:
        layer = copy.deepcopy(layer).eval()

        def infer() -> object:
            with torch.no_grad():
                return after(layer(x))

        return infer

    for run, call in (
        ("training", training),
        ("its forward", lambda layer, after: lambda: after(layer(x))),
        ("inference", inference),
    ):
        calls = {name: call(*contestant) for name, contestant in contestants.items()}
        yield _line("x".join(map(str, shape)) + " relu" * relu, run, calls, device, seconds)


def model(
    net: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    channels_last: bool = False,
    seconds: float = 10.0,
    name: str = "model",
) -> Line:
    """A whole training step, forward, backward and SGD, of a net as it is and converted.

    Args:
        net: takes x and gives a tensor, or a tuple or mapping of them.
        shape: of the minibatch x.
        dtype: bfloat16 or float16 by autocast.
        device: where.
        channels_last: layout of x and of the weights.
        seconds: budget.
        name: of the line.

    Raises:
        ValueError: the net has no batch norm, or does not take x.
    """
    calls = {name: step(candidate, shape, dtype, device, channels_last) for name, candidate in candidates(net).items()}
    try:
        calls["norm"]()
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"expected a model that takes float inputs of shape {shape}, it says: {reason}") from error
    return _line(f"{name} {'x'.join(map(str, shape))}", "training step", calls, device, seconds)


def candidates(net: nn.Module) -> dict[str, nn.Module]:
    """The net as it is, a copy, and a converted copy.

    Raises:
        ValueError: it has no batch norm.
    """
    again, renorm = copy.deepcopy(net), convert_batchnorm(copy.deepcopy(net), clip=OPEN, fuse_relu=True)
    if not any(isinstance(layer, BatchRenorm) for layer in renorm.modules()):
        raise ValueError(f"expected a model with batch norm, got {type(net).__name__} without any")
    return {"norm": net, "again": again, "renorm": renorm}


def step(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool) -> Call:
    """A call that trains the net by one step on random data."""
    generator = torch.Generator().manual_seed(0)
    x = arrange(torch.randn(shape, generator=generator).to(device), channels_last)
    net = net.to(device).train()
    if channels_last and x.ndim == 4:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # So small that hundreds of steps on noise change nothing that costs time.
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    cast = nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype)

    def run() -> object:
        optimizer.zero_grad()
        with cast:
            outputs = net(x)
        if isinstance(outputs, dict):
            outputs = tuple(outputs.values())
        parts = [outputs] if isinstance(outputs, Tensor) else [part for part in outputs if isinstance(part, Tensor)]
        loss = torch.stack([part.float().square().mean() for part in parts]).sum()
        loss.backward()
        optimizer.step()
        return loss

    return run


def load(name: str) -> nn.Module:
    """The model of a name: ``torchvision:resnet50``, untrained, or ``package.module:function``, called with nothing.

    Raises:
        ValueError: there is no such model.
        RuntimeError: its package cannot be imported.
    """
    place, colon, function = name.partition(":")
    if not (place and colon and function):
        raise ValueError(f"expected PACKAGE:NAME as in torchvision:resnet50, got {name!r}")
    try:
        found = importlib.import_module("torchvision.models" if place == "torchvision" else place)
    except (ImportError, RuntimeError) as error:  # torchvision's operators may be of another build of torch
        raise RuntimeError(f"expected {place} to be importable, it says: {error}; install it for this torch") from error
    if place == "torchvision" and function not in found.list_models(module=found):
        raise ValueError(f"expected a classification model of torchvision, got {function!r}; for example resnet50")
    if not callable(getattr(found, function, None)):
        raise ValueError(f"expected a function or class {function} in {place}, got none")
    # Else Inception-v3 and GoogLeNet warn that their first weights take long.
    more = {"init_weights": False} if place == "torchvision" and function in ("inception_v3", "googlenet") else {}
    net = getattr(found, function)(**more)
    if not isinstance(net, nn.Module):
        raise ValueError(f"expected {name} to make a torch.nn.Module, got {type(net).__name__}")
    return net


def _line(what: str, run: str, calls: dict[str, Call], device: str, seconds: float) -> Line:
    times = summarise(time_rounds(calls, "norm", seconds, wall(device)), "norm")
    return Line(what, run, times["norm"], times["again"], times["renorm"])
