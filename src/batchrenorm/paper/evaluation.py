"""Measuring a net: accuracy with either kind of statistics, and what r and d do."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import BatchRenorm
from ..schedule import ClipSchedule
from .data import Split


class Score(NamedTuple):
    """How well a net does on some images."""

    accuracy: float  # percent
    loss: float | None  # None where it is not finite


@torch.no_grad()
def with_averages(model: nn.Module, split: Split) -> Score:
    """Inference: every image by itself, normalised by mu and sigma."""
    model.eval()
    score = _score(model(split.x), split.y)
    model.train()
    return score


@torch.no_grad()
def with_batch_statistics(model: nn.Module, split: Split, batches: list[list[int]]) -> Score:
    """Inference normalised by mu_B and sigma_B, in the groups of training; the model does not change.

    Args:
        model: the net.
        split: the images.
        batches: indices into split; each a minibatch, all of one size.
    """
    # A copy, since a training forward moves the averages. All minibatches go in at once, each in groups of its own.
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, BatchRenorm):
            layer.clip = ClipSchedule.constant(1.0, 0.0)
            layer.microbatch_size = layer.microbatch_size or len(batches[0])
    index = torch.tensor(batches).flatten()
    return _score(model(split.x[index]), split.y[index])


def _score(outputs: Tensor, labels: Tensor) -> Score:
    # A row with a NaN has no answer: argmax would name one all the same.
    right = (outputs.argmax(1) == labels) & outputs.isfinite().all(1)
    loss = F.cross_entropy(outputs, labels).item()
    return Score(right.double().mean().item() * 100, loss if math.isfinite(loss) else None)


class Corrections(NamedTuple):
    """r and d of one training forward, averaged over groups, channels and layers."""

    r_clipped: float  # fraction outside [1/r_max, r_max] before clipping
    d_clipped: float
    r_mean: float  # after clipping
    d_mean: float
    d_abs_mean: float  # of |d|


@contextmanager
def corrections(model: nn.Module) -> Iterator[list[Corrections]]:
    """Watch the training forwards inside the block: one entry per Batch Renormalization layer and forward, in order.

    r and d are computed here from the layer's input and its averages before the step, independently of the layer.
    """
    seen: list[Corrections] = []

    def watch(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, BatchRenorm)
        assert layer.running_mean is not None
        assert layer.running_std is not None
        assert layer.num_batches_tracked is not None
        x = args[0].detach()
        groups = x.unflatten(0, (-1, layer.microbatch_size or len(x)))
        var, mean = torch.var_mean(groups, 1, correction=0)
        r = (var + layer.eps).sqrt() / layer.running_std
        d = (mean - layer.running_mean) / layer.running_std
        r_max, d_max = (float(limit) for limit in layer.clip(layer.num_batches_tracked))
        r_clipped = ((r > r_max) | (r < 1 / r_max)).double().mean().item()
        d_clipped = (d.abs() > d_max).double().mean().item()
        r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        seen.append(Corrections(r_clipped, d_clipped, r.mean().item(), d.mean().item(), d.abs().mean().item()))

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.modules() if isinstance(layer, BatchRenorm)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
