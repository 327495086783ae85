"""Measuring a net: accuracy with each kind of statistics, and what r and d do."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import BatchRenorm
from ..schedule import ClipSchedule
from .data import Split
from .mabn import Mabn
from .models import logits
from .normalizers import MovingAverageNorm

# Enough to keep a processor busy, few enough for any memory; a multiple of 25 x 2, the paper's test minibatch.
_ITEMS = 400


class Score(NamedTuple):
    """How well a net does on some images."""

    accuracy: float  # percent
    loss: float | None  # None where it is not finite


def with_averages(model: nn.Module, split: Split, rows: Sequence[int]) -> Score:
    """Inference: every image by itself, normalised by mu and sigma.

    Args:
        model: the net; it does not change.
        split: the images.
        rows: which of them.
    """
    with _mode(model, training=False):
        return _score(model, split, [list(rows[i : i + _ITEMS]) for i in range(0, len(rows), _ITEMS)])


def with_batch_statistics(model: nn.Module, split: Split, batches: Sequence[Sequence[int]], group: int) -> Score:
    """Inference normalised by mu_B and sigma_B; the model does not change.

    Args:
        model: the net.
        split: the images.
        batches: indices into split; each a minibatch, all of one size.
        group: consecutive images that are normalised together.
    """
    model = _training_copy(model)
    for layer in model.modules():
        if isinstance(layer, BatchRenorm):
            layer.clip = ClipSchedule.constant(1.0, 0.0)
            layer.microbatch_size = group
    return _score(model, split, _joined(batches))


def in_training(model: nn.Module, split: Split, batches: Sequence[Sequence[int]]) -> Score:
    """The training forward, with r and d from the averages as they are; the model does not change.

    Args:
        model: the net.
        split: the images.
        batches: indices into split; each a minibatch, all of one size.
    """
    model = _training_copy(model)
    for layer in model.modules():
        if isinstance(layer, BatchRenorm):
            layer.momentum = 0.0
            assert layer.num_batches_tracked is not None
            layer.clip = ClipSchedule.constant(*(float(limit) for limit in layer.clip(layer.num_batches_tracked)))
            layer.microbatch_size = layer.microbatch_size or len(batches[0])
        elif isinstance(layer, (Mabn, MovingAverageNorm)):
            layer.momentum = 0.0
    return _score(model, split, _joined(batches))


def _training_copy(model: nn.Module) -> nn.Module:
    # A training forward moves the averages and the counter: of the copy.
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    return model


def _joined(batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Several minibatches in each forward: their groups are normalised by themselves all the same."""
    together = max(1, _ITEMS // len(batches[0]))
    lists = list(batches)
    return [[*chain.from_iterable(lists[i : i + together])] for i in range(0, len(lists), together)]


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    was = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was)


@torch.no_grad()
def _score(model: nn.Module, split: Split, plan: list[list[int]]) -> Score:
    device = next(model.parameters()).device
    replicas = dist.is_initialized()
    # Processes share the work: each takes every n-th piece.
    mine = plan[dist.get_rank() :: dist.get_world_size()] if replicas else plan
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in split.minibatches(mine):
        outputs = logits(model(x)).float()
        # A row with a NaN has no answer: argmax would name one all the same.
        right = (outputs.argmax(1) == y) & outputs.isfinite().all(1)
        loss = F.cross_entropy(outputs, y, reduction="sum")
        sums += torch.stack([right.sum().double(), loss.double(), torch.tensor(len(y), device=device).double()])
    if replicas:
        dist.all_reduce(sums)
    right, loss, n = sums.tolist()
    return Score(100 * right / n, loss / n if math.isfinite(loss) else None)


class Corrections(NamedTuple):
    """r and d of one training forward of one layer, averaged over groups and channels."""

    r_clipped: float  # fraction outside [1/r_max, r_max] before clipping
    d_clipped: float
    r_mean: float  # after clipping
    d_mean: float
    d_abs_mean: float  # of |d|


@torch.no_grad()
def corrections(model: nn.Module, x: Tensor) -> dict[str, Corrections]:
    """What r and d would be in a training forward of this minibatch; the model does not change.

    They are computed here from each layer's input and its averages, independently of the layer.

    Args:
        model: the net.
        x: ``(N, ...)``, the minibatch.

    Returns:
        By the layer's name, in the order of the forward. Empty without Batch Renormalization.
    """
    if not any(isinstance(layer, BatchRenorm) for layer in model.modules()):
        return {}
    seen: dict[str, Corrections] = {}

    def watch(name: str, layer: BatchRenorm, x: Tensor) -> None:
        assert layer.running_mean is not None
        assert layer.running_std is not None
        assert layer.num_batches_tracked is not None
        groups = x.float().unflatten(0, (-1, layer.microbatch_size or len(x)))
        var, mean = torch.var_mean(groups, [1, *range(3, groups.ndim)], correction=0)
        r = (var + layer.eps).sqrt() / layer.running_std
        d = (mean - layer.running_mean) / layer.running_std
        r_max, d_max = (float(limit) for limit in layer.clip(layer.num_batches_tracked))
        r_clipped = ((r > r_max) | (r < 1 / r_max)).double().mean().item()
        d_clipped = (d.abs() > d_max).double().mean().item()
        r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        seen[name] = Corrections(r_clipped, d_clipped, r.mean().item(), d.mean().item(), d.abs().mean().item())

    model = _training_copy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, BatchRenorm):

            def hook(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                assert isinstance(layer, BatchRenorm)
                watch(name, layer, args[0])

            layer.register_forward_pre_hook(hook)
    model(x)
    return seen
