"""Averages that belong to the weights: measured anew, and averaged along with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import sync_running_stats
from .modules import BatchRenorm
from .schedule import ClipSchedule

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def recalibrate(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    group: object | None = None,
) -> Model:
    """Measure the moving averages anew: the plain means of mu_B and of sigma_B over the loader's minibatches.

    After training (an average over the last 1 / alpha steps lags behind the weights), after averaging or loading
    weights, after `convert_batchnorm`. Every layer normalises by its minibatch meanwhile (r = 1, d = 0), so the old
    averages, which may belong to other weights, have no say; take minibatches that are not tiny.

    Args:
        model: any module; its modes, clip schedules, steps and momenta come back.
        loader: of inputs, or of tuples or lists with the input first, as `torch.optim.swa_utils.update_bn` takes it.
        device: to move inputs to, or None.
        group: share the result with these replicas, each of which has its part of the data: a
            `torch.distributed.ProcessGroup`, its name, or "world"; None is this process alone. All minibatches of all
            replicas count the same. Layers with a process_group of their own need as many minibatches on each.

    Returns:
        The same model.

    Raises:
        ValueError: the loader is empty. After this or any other error the averages are as before.

    Examples:
        >>> from batchrenorm import BatchRenorm1d
        >>> model = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
        >>> _ = recalibrate(model, [torch.randn(32, 2) for _ in range(10)])

    Source: section 3 of "Rethinking 'Batch' in BatchNorm" (Wu & Johnson 2021), with the paper's sigma.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchRenorm) and m.running_mean is not None]
    modes = {m: m.training for m in model.modules()}
    settings = [(m.momentum, m.clip, [b.clone() for b in _buffers(m)]) for m in layers]
    seen = 0
    succeeded = False
    try:
        model.eval()
        for m in layers:
            m.train()
            m.reset_running_stats()
            m.momentum, m.clip = None, ClipSchedule.constant(1.0, 0.0)
        for item in loader:
            x = item[0] if isinstance(item, (list, tuple)) else item
            model(x if device is None else x.to(device))
            seen += 1
        if group is not None:
            sync_running_stats(model, group, weight=seen)
        if layers and not any(m.num_batches_tracked for m in layers):
            raise ValueError("expected at least one minibatch, got an empty loader; iterators can be used up only once")
        succeeded = True
    finally:
        for m, (momentum, clip, before) in zip(layers, settings):
            m.momentum, m.clip = momentum, clip
            mean, var, step = _buffers(m)
            if not succeeded:
                mean.copy_(before[0])
                var.copy_(before[1])
            else:  # a layer that the forward does not reach keeps what it has
                mean.copy_(torch.where(step > 0, mean, before[0]))
                var.copy_(torch.where(step > 0, var, before[1]))
            step.copy_(before[2])
        for module, mode in modes.items():
            module.training = mode
    return model


def _buffers(layer: BatchRenorm) -> tuple[Tensor, Tensor, Tensor]:
    return layer.running_mean, layer.running_var, layer.num_batches_tracked  # type: ignore[return-value]


def average_sigma(
    model: nn.Module, avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An `avg_fn` for `torch.optim.swa_utils.AveragedModel(..., use_buffers=True)` that averages sigma.

    The buffer is a variance, ``running_var = sigma² - eps``, and the mean of variances is not the variance of the mean
    sigma. Everything else is left to the given function; but steps are copied, not averaged.

    Args:
        model: the one that is trained, whose parameters and buffers stay where they are in memory.
        avg_fn: ``avg_fn(averaged, current, number)``, e.g. `torch.optim.swa_utils.get_ema_avg_fn(0.999)`.

    Returns:
        A function like avg_fn.

    Raises:
        ValueError: in the average, a tensor that is not the model's.

    Examples:
        >>> from batchrenorm import BatchRenorm1d
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
        >>> model = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
        >>> averaged = AveragedModel(model, avg_fn=average_sigma(model, get_ema_avg_fn(0.999)), use_buffers=True)
    """

    known: dict[int, tuple[Tensor, BatchRenorm | None]] = {}

    def average(averaged: Tensor, current: Tensor, number: Tensor) -> Tensor:
        address = current.data_ptr()
        # Anew where `.to()` or loading may have moved something.
        if address not in known or known[address][0].data_ptr() != address:
            known.clear()
            known.update((t.data_ptr(), (t, None)) for t in (*model.parameters(), *model.buffers()))
            for layer in model.modules():
                if isinstance(layer, BatchRenorm) and layer.running_var is not None:
                    known.update((b.data_ptr(), (b, layer)) for b in layer.buffers())
        if address not in known:
            raise ValueError(
                "expected a tensor of the model that average_sigma was given, got another one or a copy; give it the "
                "model that update_parameters gets, and keep the average on the same device"
            )
        tensor, norm = known[address]
        if norm is not None and tensor is norm.running_var:
            sigmas = ((v.double() + norm.eps).sqrt() for v in (averaged, current))
            sigma = avg_fn(*sigmas, number)  # type: ignore[call-arg]
            return F.softshrink(sigma.square(), norm.eps).to(averaged.dtype)
        return current if norm is not None and tensor is norm.num_batches_tracked else avg_fn(averaged, current, number)

    return average
