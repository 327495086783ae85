"""BatchNorm <-> BatchRenorm.

A layer is converted by giving the object its new class and attributes, as torch's own lazy layers do when they learn
their size. So whatever refers to the layer goes on referring to it: parents at any depth, several parents of one shared
layer, hooks, the optimiser that holds its parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .correction import name_of_history
from .functional import check_settings
from .modules import (
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    Clip,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
)
from .schedule import ClipSchedule

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# By exact type: a subclass may do more (timm's BatchNormAct2d also applies the activation).
_RENORM: dict[type[nn.Module], type[BatchRenorm]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: BatchRenorm,  # of any rank, as SyncBatchNorm is
    nn.LazyBatchNorm1d: LazyBatchRenorm1d,
    nn.LazyBatchNorm2d: LazyBatchRenorm2d,
    nn.LazyBatchNorm3d: LazyBatchRenorm3d,
}
_NORM: dict[type[nn.Module], type[nn.Module]] = {renorm: norm for norm, renorm in _RENORM.items()}


def convert_batchnorm(
    model: Model,
    *,
    clip: Clip = ClipSchedule(),
    momentum: float | None = 0.01,
    microbatch_size: int | None = None,
    process_group: object | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Turn every batch-norm layer of a model into Batch Renormalization, in place.

    Converted are `BatchNorm1d/2d/3d`, `SyncBatchNorm` (to `BatchRenorm`, with statistics of its own replica) and the
    lazy ones, at any depth, shared or not. Layers keep their identity, so do their parameters (an optimiser goes on
    with its state) and hooks; training flag, device, dtype, requires_grad, eps, averages and step count stay. Inference
    is unchanged. Subclasses stay as they are, since they may do more than batch norm; each is named in the log.

    Args:
        model: any module; a single layer too.
        clip: limits as a function of the step; the step goes on from `num_batches_tracked`.
        momentum: weight of the new value in the averages; the paper's 0.01 rather than the layer's own, which was
            chosen for averages that training does not use. None for the cumulative mean.
        microbatch_size: see `BatchRenorm`.
        process_group: see `BatchRenorm`.
        where: ``where(name, layer) -> bool`` picks the layers; None picks all.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument out of its range; nothing has been converted.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert_batchnorm(model, clip=ClipSchedule.for_training(10_000))[1].__class__.__name__
        'BatchRenorm2d'
    """
    check_settings(0.0 if momentum is None else momentum, 0.0, 1.0, 0.0, microbatch_size, process_group, None)
    if not callable(clip):
        raise TypeError(f"expected clip to be a ClipSchedule, got {clip!r}; a constant is ClipSchedule.constant(r, d)")
    for name, layer in list(model.named_modules()):
        if where is not None and not where(name, layer):
            continue
        renorm = _RENORM.get(type(layer))
        if renorm is None:
            if isinstance(layer, _NormBase) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                log.info("%s stays %s: it may do more than batch norm", name or "the model", type(layer).__name__)
            continue
        layer.__class__ = renorm
        layer.momentum = momentum
        layer.clip = clip
        layer.microbatch_size = microbatch_size
        layer.process_group = process_group
        layer._layer = name_of_history()
    return model


def to_batchnorm(model: Model) -> Model:
    """Turn every Batch Renormalization layer of a model into the `torch.nn.BatchNorm` of equal inference, in place.

    What folds, exports, scripts or quantises batch norm takes it from there. Training goes on as batch norm; to keep
    the model, convert a `copy.deepcopy` of it.

    Args:
        model: any module; a single layer too.

    Returns:
        The same model. A `BatchRenorm` of any rank becomes `SyncBatchNorm`, which is batch norm of any rank.

    Example:
        >>> layer = BatchRenorm2d(8).eval()
        >>> x = torch.randn(2, 8, 4, 4)
        >>> expected = layer(x)
        >>> torch.equal(to_batchnorm(layer)(x), expected)
        True
    """
    for layer in list(model.modules()):
        norm = _NORM.get(type(layer))
        if norm is None:
            continue
        layer.__class__ = norm
        for name in ("clip", "microbatch_size", "_layer"):
            delattr(layer, name)
        if norm is not nn.SyncBatchNorm:
            delattr(layer, "process_group")
    return model
