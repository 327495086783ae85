"""BatchNorm <-> BatchRenorm.

A layer is converted by giving the object its new class and attributes, as torch's own lazy layers do when they learn
their size. So whatever refers to the layer goes on referring to it: parents at any depth, several parents of one shared
layer, hooks, the optimiser that holds its parameters.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer

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
    Momentum,
    check_gradient,
)
from .replicas import WORLD, group_called
from .schedule import CUMULATIVE, ClipSchedule, MomentumSchedule

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


class BatchRenormAct2d(BatchRenorm2d):
    """``act(drop(norm(x)))``: what `convert_batchnorm` makes of timm's `BatchNormAct2d`, with its modules and keys.

    It has no constructor of its own; build timm's and convert it.
    """

    drop: nn.Module
    act: nn.Module
    _was: type[nn.Module]  # what `to_batchnorm` makes of it again; timm is not imported here

    def forward(self, x: Tensor, mask: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.act(self.drop(super().forward(x, mask, residual)))


def _renorm_of(layer: nn.Module) -> type[BatchRenorm] | None:
    kind = type(layer)
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return BatchRenormAct2d
    return _RENORM.get(kind)


def _norm_of(layer: nn.Module) -> type[nn.Module] | None:
    return layer._was if type(layer) is BatchRenormAct2d else _NORM.get(type(layer))


def _has_trained_averages(layer: nn.Module) -> bool:
    """Whether the averages are no longer a new layer's. The counter does not tell: many checkpoints have 0 there."""
    mean, var = layer.running_mean, layer.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    if isinstance(mean, UninitializedBuffer) or mean.is_meta:
        return False
    return bool(mean.ne(0).any() | var.ne(1).any())


def convert_batchnorm(
    model: Model,
    *,
    clip: Clip | None = None,
    momentum: Momentum = 0.01,
    microbatch_size: int | None = None,
    process_group: object | None = None,
    fuse_relu: bool = False,
    gradient: str = "microbatch",
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Turn every batch-norm layer of a model into Batch Renormalization, in place.

    Converted are `BatchNorm1d/2d/3d`, `SyncBatchNorm` (to `BatchRenorm`, with its process group) and the
    lazy ones, at any depth, shared or not. Layers keep their identity, so do their parameters (an optimiser goes on
    with its state) and hooks; training flag, device, dtype, requires_grad, eps, averages and step count stay. Inference
    is unchanged. timm's `BatchNormAct2d` becomes a `BatchRenormAct2d`, which does its activation too. Other subclasses
    stay as they are, since they may do more than batch norm; each is named in the log.

    Args:
        model: any module; a single layer too.
        clip: limits as a function of the step; the step goes on from `num_batches_tracked`. None is the paper's
            `ClipSchedule()` for new layers, and `ClipSchedule.constant()`, without warm-up, for layers whose averages
            are trained (not all 0 and 1): the log says how many. Warm-up would train these as batch norm for
            5,000 steps again, since checkpoints often hold 0 for the step. The choice is no state: to resume such a
            training give `clip` itself, or the checkpoint will be loaded into new layers that warm up.
        momentum: weight of the new value in the averages; the paper's 0.01 rather than the layer's own, which was
            chosen for averages that training does not use. See `BatchRenorm` for what else it may be.
        microbatch_size: see `BatchRenorm`.
        process_group: see `BatchRenorm`. None leaves a `SyncBatchNorm` the group that it has, which is "world" where it
            has none.
        fuse_relu: where a `nn.Sequential` has a `nn.ReLU` right after the layer, let the layer do it in its own pass
            over memory. The ReLU stays in its place as a `FusedReLU`, which passes on what it gets.
        gradient: see `BatchRenorm`. Layers without averages keep the microbatch's.
        where: ``where(name, layer) -> bool`` picks the layers; None picks all.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument out of its range; nothing has been converted.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert_batchnorm(model, clip=ClipSchedule.for_training(10_000))[1].__class__.__name__
        'BatchRenorm2d'
    """
    check_settings(
        CUMULATIVE if momentum is None else momentum, 0.0, 1.0, 0.0, microbatch_size, process_group, None, None
    )
    if clip is not None and not callable(clip):
        raise TypeError(f"expected clip to be a ClipSchedule, got {clip!r}; a constant is ClipSchedule.constant(r, d)")
    check_gradient(gradient, ClipSchedule() if clip is None else clip, True)
    trained = 0
    for name, layer in list(model.named_modules()):
        if where is not None and not where(name, layer):
            continue
        renorm = _renorm_of(layer)
        if renorm is None:
            if isinstance(layer, _NormBase) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                log.info("%s stays %s: it may do more than batch norm", name or "the model", type(layer).__name__)
            continue
        own_group = (layer.process_group or WORLD) if isinstance(layer, nn.SyncBatchNorm) else None
        limits = clip
        if limits is None:
            skip = _has_trained_averages(layer)
            trained += skip
            limits = ClipSchedule.constant() if skip else ClipSchedule()
        if renorm is BatchRenormAct2d:
            layer._was = type(layer)
        layer.__class__ = renorm
        layer.momentum = momentum
        layer.clip = limits
        layer.microbatch_size = microbatch_size
        layer.process_group = own_group if process_group is None else process_group
        layer.activation = None
        layer._layer = name_of_history()
        layer._set_gradient(gradient if layer.running_mean is not None else "microbatch")
    if trained:
        log.info("%d layers have trained averages, so their limits are open from the first step: no warm-up", trained)
    if fuse_relu:
        for layer, relu in _pairs(model, nn.ReLU):
            if where is None or any(where(name, m) for name, m in model.named_modules() if m is layer):
                layer.activation = "relu"
                relu.__class__ = FusedReLU
    return model


class FusedReLU(nn.Identity):
    """The place of a `nn.ReLU` that the layer before it does; `to_batchnorm` makes it one again."""

    inplace: bool


class BatchNormAct(nn.Module):
    """``relu(norm(x) + residual)``: what `to_batchnorm` makes of a layer that was built with an activation.

    Args:
        norm: the batch norm.

    Examples:
        >>> layer = to_batchnorm(BatchRenorm2d(8, activation="relu"))
        >>> type(layer).__name__, type(layer.norm).__name__
        ('BatchNormAct', 'BatchNorm2d')
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.training = norm.training

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See the class."""
        y = self.norm(x)
        return (y if residual is None else y + residual).relu()


def _pairs(model: nn.Module, follower: type[nn.Module]) -> list[tuple[BatchRenorm, nn.Module]]:
    """The layers that a `nn.Sequential` has right before one of the followers, if neither has another place too."""
    places: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    found = []
    for parent in model.modules():
        if type(parent) is nn.Sequential:
            children = list(parent)
            for layer, relu in itertools.pairwise(children):
                once = places[id(layer)] == places[id(relu)] == 1
                if type(layer) in _NORM and type(relu) is follower and once:
                    found.append((layer, relu))
    return found  # type: ignore[return-value]


def to_batchnorm(model: Model) -> Model:
    """Turn every Batch Renormalization layer of a model into the `torch.nn.BatchNorm` of equal inference, in place.

    What folds, exports, scripts or quantises batch norm takes it from there. Training goes on as batch norm; to keep
    the model, convert a `copy.deepcopy` of it. A ReLU that was fused comes back to its place; a layer that was built
    with an activation becomes a `BatchNormAct` with the batch norm in it.

    Args:
        model: any module; a single layer too.

    Returns:
        The same model. A `BatchRenorm` of any rank becomes `SyncBatchNorm`, which is batch norm of any rank.

    Examples:
        >>> layer = BatchRenorm2d(8).eval()
        >>> x = torch.randn(2, 8, 4, 4)
        >>> expected = layer(x)
        >>> torch.equal(to_batchnorm(layer)(x), expected)
        True
    """
    for layer, relu in _pairs(model, FusedReLU):
        layer.activation = None
        relu.__class__ = nn.ReLU
    activated: dict[nn.Module, nn.Module] = {
        layer: BatchNormAct(layer) for layer in model.modules() if type(layer) in _NORM and layer.activation is not None
    }
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in activated:
                parent._modules[name] = activated[child]
    for module in [*model.modules(), *activated]:
        norm = _norm_of(module)
        if norm is None:
            continue
        if type(module) is BatchRenormAct2d:
            del module._was
        module.__class__ = norm
        if isinstance(module.momentum, MomentumSchedule):
            module.momentum = module.momentum.momentum  # type: ignore[assignment]
        if module.gradient == "moving":
            del module.gradient_mean, module.gradient_slope
        for attribute in ("clip", "microbatch_size", "activation", "gradient", "_layer"):
            delattr(module, attribute)
        if norm is not nn.SyncBatchNorm:
            delattr(module, "process_group")
        elif isinstance(module.process_group, str):
            group = None if module.process_group == WORLD else group_called(module.process_group)
            module.process_group = group  # type: ignore[assignment]
    return activated.get(model, model)  # type: ignore[return-value]
